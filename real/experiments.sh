#!/usr/bin/env bash
# A real model made safe, and the baselines, by adapters (LoRA) on two CPU cores, in about four
# hours.
#
#     MODEL=folder XSTEST=folder PKU=folder real/experiments.sh
#     PARTS="1 choose" MODEL=… XSTEST=… PKU=… real/experiments.sh
#         these alone, of 1 choose 2 3 4 5 6
#
# MODEL is SmolLM2-135M-Instruct as a Hugging Face folder. real/prepare.py says what the two data
# folders hold. Folders are absolute, or relative to the project's folder. As many parts as there are
# cores run at a time, with one thread each (CORES=1: one after the other). Each command is printed
# before it runs; finished runs are kept, and a stopped one goes on, so that runs/real has to be
# deleted when a setting or the data change. What real/figures.py needs is written to real/results/
# whenever a part is done. It takes safetensors, and memory: 2.5 GB for each part at a time, and 4.5
# for part 1 while it trains all weights.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MODEL:?a Hugging Face folder}" "${XSTEST:?a folder of pairs}" "${PKU:?a folder of answers}"
out=runs/real data=runs/real/data results=real/results
mkdir -p $out/logs

if [ -z "${PART-}" ]; then  # this script runs itself for each part
    [ -f $data/ordinary.jsonl ] || python -m real.prepare "$MODEL" "$XSTEST" "$PKU" $data
    cores=${CORES:-$(nproc)} parts=${PARTS:-1 choose 2 3 4 5 6}
    printf "%s\n" $parts |
        OMP_NUM_THREADS=1 xargs -P "$cores" -I {} env PART={} bash real/experiments.sh || {
        echo "real/experiments.sh: a part has failed, as said above; the same command goes on" >&2
        exit 1
    }
    processor=$(grep -m 1 -o "model name.*" /proc/cpuinfo | cut -d: -f2- || true)
    torch=$(python -c "import torch; print(torch.__version__)")
    echo "$(date -I): parts $parts, commit $(git log -1 --format=%h), torch $torch,$processor," \
        "$cores cores: $((SECONDS / 60)) min" | tee -a $results/made.txt
    exit
fi

# Answers are greedy: they are what the model holds most probable. Whether an answer refuses shows in
# its first words, so that training sees about sixteen tokens of each.
common=(--dtype bfloat16 --max_length 54 --temperature 0 --max_new_tokens 96 --warmup 0.1)
sft=(--init_from "$MODEL" --lora_rank 16 --sft_epochs 1 --sft_lr 2e-3 --sft_batch_size 8 --epochs 0)
safedpo=(--beta 1 --lr 3e-4 --batch_size 4 --epochs 1)

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

method() {  # method NAME DATA FLAGS…: preference training that begins with the part's reference
    run "$group/$1" --data "$2" --seed $seed "${safedpo[@]}" "${@:3}" \
        --init_from $out/sft/$group/reference.pt
}

judge() {  # judge NAME FLAGS…: what eval.py says of the part's runs on some data
    logged "$group-$1" eval.py $out/$group/* --dtype bfloat16 --json "$results/$group/$1.json" \
        "${@:2}"
}

# Δ. The part "choose", on a quarter of XSTest's training prompts, has found it: of those that refuse
# at most 25 % of the benign prompts, the one that refuses most of the unsafe ones. Where two refuse as
# many, the one that refuses fewer benign prompts. For other data run that part first. BEST in
# real/figures.py is the same.
best=0

# The other parts are seeds. Seed 1 has all methods, 2 and 3 repeat those that matter most. Seeds 4 to
# 6 have SafeDPO with and without an anchor: its α/β is that of the village.
group=seed$PART seed=$PART split=all deltas=$best
case $PART in
choose) group=choose seed=1 split=choose deltas="0 2 5 10" ;;
1) deltas="0 2 5 10 20" ;;
esac
pairs=$data/$split/pairs
run sft/$group --data $data/$split/sft --seed $seed "${sft[@]}"
for delta in $deltas; do
    method safedpo-delta$delta $pairs --delta $delta
done
if [[ $PART = [456] ]]; then
    method anchored-delta$best $pairs --delta $best --anchor 1
elif [[ $PART = [123] ]]; then
    method dpo-helpful $pairs --pairs helpful
    method noswap-delta$best $pairs --pairs noswap --delta $best
fi
if [ "$PART" = 1 ]; then
    run $group/base --data $pairs --epochs 0 --init_from "$MODEL"
    # All weights instead of adapters; a tenth of their step size, which nobody has tuned.
    [ -d $out/sft/whole ] || logged $group-whole eval.py $out/sft/$group --export $out/sft/whole
    run $group/whole-delta$best --data $pairs --seed $seed "${safedpo[@]}" --delta $best --lr 3e-5 \
        --init_from $out/sft/whole
    method dpo-harmless $pairs --pairs harmless
    method dpo-safebetter $pairs --pairs safebetter
    # What the answers of the model itself are good for.
    mkdir -p $data/without-own
    cp $pairs/*.jsonl $data/without-own
    rm $data/without-own/train-own*.jsonl
    method without-own-delta$best $data/without-own --delta $best
fi
mkdir -p $results/$group
judge xstest
judge everyday --data real/everyday.jsonl
judge pku --data $data/pku --max_length 256 --eval_prompts 1
logged "$group-ordinary" -m real.ordinary $data/ordinary.jsonl \
    $results/$group/ordinary.json $out/$group/*
