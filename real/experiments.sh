#!/usr/bin/env bash
# A real model made safe, and the baselines, by adapters (LoRA) on two CPU cores. A draft: Δ and the
# step size of SafeDPO are not chosen yet, and no page shows its results.
#
#     MODEL=folder XSTEST=folder PKU=folder real/experiments.sh
#     SEEDS="1 2" MODEL=… XSTEST=… PKU=… real/experiments.sh     # of 1, 2 and 3, only these
#
# MODEL is SmolLM2-135M-Instruct as a Hugging Face folder. real/prepare.py says what the two data
# folders hold. Folders are absolute, or relative to the project's folder. Each command is printed
# before it runs; finished runs are kept, and a stopped one goes on. What real/figures.py needs is
# written to real/results/ whenever a seed is done.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MODEL:?a Hugging Face folder}" "${XSTEST:?a folder of pairs}" "${PKU:?a folder of answers}"
out=runs/real data=runs/real/data results=real/results
mkdir -p $out/logs
[ -f $data/ordinary.jsonl ] || python -m real.prepare "$MODEL" "$XSTEST" "$PKU" $data

# Answers are greedy: they are what the model holds most probable. Whether an answer refuses shows in
# its first words, so that training sees about sixteen tokens of each.
common=(--dtype bfloat16 --max_length 54 --temperature 0 --max_new_tokens 96 --warmup 0.1)
sft=(--init_from "$MODEL" --lora_rank 16 --sft_epochs 1 --sft_lr 2e-3 --sft_batch_size 8 --epochs 0)
safedpo=(--beta 1 --lr 1e-3 --batch_size 4 --epochs 2)

logged() {  # logged NAME PROGRAM FLAGS…
    echo "python ${*:2}"
    python "${@:2}" > "$out/logs/$1.txt" 2> "$out/logs/$1.err" || {
        tail -n 1 "$out/logs/$1.err"
        exit 1
    }
}

run() {  # run NAME FLAGS…: start this run, or go on with it
    local folder=$out/$1
    [ -f "$folder/eval.json" ] && return
    if [ -f "$folder/config.json" ]; then
        logged "${1//\//-}" train.py --resume --out_dir "$folder"
    else
        logged "${1//\//-}" train.py --out_dir "$folder" "${common[@]}" "${@:2}"
    fi
}

judge() {  # judge GROUP: everything that a table shows of the group's runs
    local runs=("$out/$1"/*delta* "$out/$1"/dpo-*)
    mkdir -p "$results/$1"
    logged "$1-xstest" eval.py "${runs[@]}" --json "$results/$1/xstest.json"
    logged "$1-everyday" eval.py "${runs[@]}" --data real/everyday.jsonl \
        --json "$results/$1/everyday.json"
    logged "$1-pku" eval.py "${runs[@]}" --data $data/pku --eval_prompts 1 \
        --json "$results/$1/pku.json"
    logged "$1-ordinary" -m real.ordinary $data/ordinary.jsonl "$results/$1/ordinary.json" \
        "${runs[@]}"
}

# Δ is chosen on a quarter of the training prompts.
run choose/sft --data $data/choose/sft "${sft[@]}"
for delta in 0 2 5 10; do
    run choose/safedpo-delta$delta --data $data/choose/pairs "${safedpo[@]}" --delta $delta \
        --init_from $out/choose/sft/reference.pt
done

# Seed 1 has all methods; the others repeat those that matter most.
for seed in ${SEEDS:-1 2 3}; do
    group=seed$seed
    run $group/sft --data $data/all/sft --seed $seed "${sft[@]}"
    method() {  # method NAME FLAGS…: preference training that begins with the seed's reference
        run "$group/$1" --data $data/all/pairs --seed $seed "${safedpo[@]}" "${@:2}" \
            --init_from $out/$group/sft/reference.pt
    }
    method safedpo-delta5 --delta 5
    method dpo-helpful --pairs helpful
    method noswap-delta5 --pairs noswap --delta 5
    if [ "$seed" = 1 ]; then
        for delta in 0 10 20; do
            method safedpo-delta$delta --delta $delta
        done
        method dpo-harmless --pairs harmless
        method dpo-safebetter --pairs safebetter
    fi
    judge $group
done

processor=$(grep -m 1 -o "model name.*" /proc/cpuinfo | cut -d: -f2- || true)
torch=$(python -c "import torch; print(torch.__version__)")
echo "$(date -I): seeds ${SEEDS:-1 2 3}, commit $(git log -1 --format=%h), torch $torch,$processor," \
    "$(nproc) cores: $((SECONDS / 60)) min" | tee -a $results/made.txt
