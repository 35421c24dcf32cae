#!/usr/bin/env bash
# A real model made safe. A draft: its settings are not chosen yet, and no page shows its results.
#
#     MODEL=folder XSTEST=folder PKU=folder real/experiments.sh
#
# MODEL is SmolLM2-135M-Instruct as a Hugging Face folder, or its name on the hub. real/prepare.py
# says what the two data folders hold. Folders are absolute, or relative to the project's folder.
# Each command is printed before it runs; finished runs are kept, and a stopped one goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MODEL:?a Hugging Face folder}" "${XSTEST:?a folder of pairs}" "${PKU:?a folder of answers}"
out=runs/real results=real/results
mkdir -p $out/logs $results
python -m real.prepare "$XSTEST" "$PKU" $out/data > $out/logs/data.txt

# Answers are greedy: they are what the model holds most probable.
common=(--dtype bfloat16 --max_length 96 --micro_batch_size 4 --temperature 0 --max_new_tokens 128)
safedpo=(--beta 1 --lr 2e-4 --batch_size 8 --warmup 0.1)
sft=(--init_from "$MODEL" --lora_rank 16 --sft_epochs 1 --sft_lr 2e-4 --sft_batch_size 16)
whole=(--init_from "$MODEL" --sft_epochs 1 --sft_lr 2e-5 --sft_batch_size 16)

run() {  # run NAME FLAGS…: start this run, or go on with it
    local folder=$out/$1 log=$out/logs/${1//\//-} command
    command=(python train.py --out_dir "$folder" "${common[@]}" "${safedpo[@]}" "${@:2}")
    [ -f "$folder/config.json" ] && command=(python train.py --resume --out_dir "$folder")
    if [ ! -f "$folder/eval.json" ]; then
        echo "${command[*]}"
        "${command[@]}" > "$log.txt" 2> "$log.err" || {
            tail -n 1 "$log.err"
            exit 1
        }
    fi
}

# Δ is chosen on a quarter of the training prompts.
run choose/safedpo-delta5 --data $out/data/choose "${sft[@]}"
for delta in 0 10 20; do
    run choose/safedpo-delta$delta --data $out/data/choose --delta $delta \
        --init_from $out/choose/safedpo-delta5/reference.pt
done

# The first run of a seed also trains the reference, with which the others begin.
for seed in 1 2 3; do
    group=seed$seed all=(--data $out/data/all --seed $seed)
    run $group/safedpo-delta5 "${all[@]}" "${sft[@]}"
    all+=(--init_from $out/$group/safedpo-delta5/reference.pt)
    run $group/dpo-helpful "${all[@]}" --pairs helpful
    run $group/noswap-delta5 "${all[@]}" --pairs noswap
    if [ $seed = 1 ]; then
        for delta in 0 10 20; do
            run $group/safedpo-delta$delta "${all[@]}" --delta $delta
        done
        run $group/dpo-harmless "${all[@]}" --pairs harmless
        run $group/dpo-safebetter "${all[@]}" --pairs safebetter
        run $group/whole-safedpo-delta5 --data $out/data/all --seed $seed "${whole[@]}" --lr 2e-5
    fi
done

runs=($out/seed*/*)
python eval.py $out/choose/* --json $results/choose.json > $out/logs/choose.txt
python eval.py "${runs[@]}" --json $results/xstest.json > $out/logs/xstest.txt
python eval.py "${runs[@]}" --data $out/data/pku --json $results/pku.json > $out/logs/pku.txt
python eval.py "${runs[@]}" --data real/everyday.jsonl --json $results/everyday.json \
    > $out/logs/everyday.txt
python -m real.ordinary "$MODEL" $out "${runs[@]}" > $out/logs/ordinary.txt
cp $out/ordinary.json $results/

processor=$(grep -m 1 -o "model name.*" /proc/cpuinfo | cut -d: -f2- || true)
torch=$(python -c "import torch; print(torch.__version__)")
echo "$(date -I): commit $(git log -1 --format=%h), torch $torch,$processor," \
    "$(nproc) cores: $((SECONDS / 60)) min" | tee -a $results/made.txt
