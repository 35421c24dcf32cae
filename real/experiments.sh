#!/usr/bin/env bash
# A real model made safe: the runs behind "A real model" in README.md and docs/results.md.
#
#     MODEL=folder XSTEST=folder PKU=folder real/experiments.sh
#     SEEDS="1 2 3" …             the seeds of the runs that have several (default: 1 2 3)
#
# MODEL is SmolLM2-135M-Instruct as a Hugging Face folder, or its name on the hub. real/prepare.py
# says what the two data folders hold. Each command is printed before it runs; finished runs are
# kept, and a stopped one goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MODEL:?a Hugging Face folder}" "${XSTEST:?a folder of pairs}" "${PKU:?a folder of answers}"
out=runs/real results=real/results
mkdir -p $out/logs $results
python -m real.prepare "$XSTEST" "$PKU" $out/data > $out/logs/data.txt

# What all runs share. Answers are greedy, since the question is what the model says.
common=(--dtype bfloat16 --max_length 96 --temperature 0 --max_new_tokens 128 --warmup 0.1
    --micro_batch_size 4 --batch_size 8 --beta 1 --lr 2e-4)
sft=(--init_from "$MODEL" --lora_rank 16 --sft_epochs 1 --sft_lr 2e-4 --sft_batch_size 16)

run() {  # run FOLDER FLAGS…: start this run, or go on with it
    local folder=$out/$1 command
    command=(python train.py --out_dir "$folder" "${common[@]}" "${@:2}")
    [ -f "$folder/config.json" ] && command=(python train.py --resume --out_dir "$folder")
    if [ ! -f "$folder/eval.json" ]; then
        echo "${command[*]}"
        mkdir -p "$out/logs/$(dirname "$1")"
        "${command[@]}" > "$out/logs/$1.txt" 2> "$out/logs/$1.err" || {
            tail -n 1 "$out/logs/$1.err"
            exit 1
        }
    fi
}

# Δ is chosen on a quarter of the training prompts. The first run of a group trains its reference.
run choose/delta5 --data $out/data/choose "${sft[@]}"
for delta in 0 10 20; do
    run choose/delta$delta --data $out/data/choose --init_from $out/choose/delta5/reference.pt \
        --delta $delta
done
