#!/usr/bin/env bash
# All runs behind the tables and pictures: ten seeds, and all runs of a seed share one reference.
#
#     village/experiments.sh            prints each command before it runs; skips finished runs
#     CORES=8 village/experiments.sh    8 runs at a time, one thread each (default: all cores)
#     SEEDS="20 21" village/experiments.sh
#         other seeds than 0 to 9; the tables are of all seeds in runs/experiments
#     XSTEST=folder village/experiments.sh
#         also trains on pairs of answers to XSTest's prompts, in PKU-SafeRLHF's format. The folder
#         is absolute, or relative to the project's folder, and has no space in its name.
set -euo pipefail
cd "$(dirname "$0")/.."
export out=runs/experiments results=village/results cores=${CORES:-$(nproc)}
export OMP_NUM_THREADS=1  # after nproc, which reads it
all=${SEEDS:-0 1 2 3 4 5 6 7 8 9}
mkdir -p $out/logs $results
python -c "import matplotlib" || {
    echo "village/experiments.sh: the pictures need matplotlib: pip install matplotlib" >&2
    exit 2
}

stop() {  # stop LOG: show the error of a run; the status 255 makes xargs stop too
    tail -n 1 "$1"
    exit 255
}

run() {  # run GROUP SEED NAME FLAGS…: start this run, or resume it
    local folder=$out/$1/seed$2/$3 log=$out/logs/$1-seed$2-$3 command=(python train.py)
    [ "$1" = neighbours ] && command=(python -m village.neighbours "$3")
    command+=(--seed "$2" --out_dir "$folder" "${@:4}")
    [ -f "$folder/config.json" ] && command+=(--resume)
    if [ ! -f "$folder/eval.json" ]; then
        echo "${command[*]}"
        "${command[@]}" > "$log.txt" 2> "$log.err" || stop "$log.err"
    fi
}
export -f run stop

each() {  # each GROUP SEEDS: read lines of NAME FLAGS…, and run each line for all these seeds
    while read -r line; do
        for seed in $2; do
            echo "$1 $seed ${line//SEED/$seed}"
        done
    done | xargs -P "$cores" -L 1 bash -c 'run "$@"' run
}

# The first run of a seed also trains the reference by SFT. The other runs reuse this reference.
each village "$all" <<END
safedpo-delta5
END

each village "$all" <<END
dpo-helpful --pairs helpful
dpo-harmless --pairs harmless
dpo-safebetter --pairs safebetter
safedpo-delta0 --delta 0
safedpo-delta2 --delta 2
safedpo-delta10 --delta 10
safedpo-delta20 --delta 20
safedpo-delta50 --delta 50
dpo-helpful-delta10 --pairs helpful --delta 10
dpo-harmless-delta10 --pairs harmless --delta 10
dpo-safebetter-delta10 --pairs safebetter --delta 10
noswap-delta0 --pairs noswap --delta 0
noswap-delta5 --pairs noswap --delta 5
noswap-delta10 --pairs noswap --delta 10
noise10 --label_noise 0.1
noise20 --label_noise 0.2
noise40 --label_noise 0.4
squared --loss squared
hinge --loss hinge
robust --loss robust
anchored --anchor 2 --epochs 4 --lr 8e-4
END

# SACPO's second stage, for safety. Its reference is the policy of the first stage, dpo-helpful.
each village "$all" <<END
sacpo --pairs harmless --init_from $out/village/seedSEED/dpo-helpful/policy.pt
END

# What keeps SafeDPO from its optimum? The runs limit-… change one setting of the defaults or two.
# Only three layers need another reference. The last run has four times the pairs. Adapters begin at
# the same reference too.
python - $out/village36000 <<END
import json, os, sys
from village import world
folder = sys.argv[1]
os.makedirs(folder, exist_ok=True)
splits = {"train": world.splits(n_train=36000)["train"], "test": world.splits()["test"]}
for split, rows in splits.items():
    with open(f"{folder}/{split}.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
END
reference=$out/village/seedSEED/safedpo-delta5/reference.pt
each village "$all" <<END
adapted --init_from $reference --lora_rank 8 --lr 2e-3
limit-lr2e-4 --lr 2e-4
limit-lr8e-4 --lr 8e-4
limit-epochs4 --epochs 4
limit-epochs4-lr1e-4 --epochs 4 --lr 1e-4
limit-epochs4-lr8e-4 --epochs 4 --lr 8e-4
limit-batch16-lr1.5e-4 --batch_size 16 --lr 1.5e-4
limit-warmup0.03 --warmup 0.03 --init_from $reference
limit-decay0 --weight_decay 0 --init_from $reference
limit-layers3 --n_layer 3
limit-rows36000 --data $out/village36000 --init_from $reference
END

each neighbours "$all" <<END
bfpo --init_from $reference
bfpo-tau0.2 --init_from $reference
modpo --init_from $reference
dpop --init_from $reference
cal-dpo --init_from $reference
see-dpo --init_from $reference
stable-po --init_from $reference
b-dpo --init_from $reference
mocan --init_from $reference
c-dpo --init_from $reference
END
for seed in $all; do
    for name in sacpo p-sacpo; do  # made of weights that are there, in a moment
        folder=$out/neighbours/seed$seed/$name
        rm -rf "$folder"
        python -m village.neighbours $name $out/village/seed"$seed"/{dpo-helpful,sacpo} "$folder"
    done
done

# Figures for figures.py. [!l]*: not the runs limit-…
python eval.py $out/village/*/[!l]* --json $results/village.json > $out/logs/village.txt
python eval.py $out/village/*/{dpo-helpful,dpo-harmless,noswap-delta5,safedpo-delta5,anchored} \
    --split unseen --json $results/unseen.json > $out/logs/unseen.txt
python eval.py $out/village/*/{safedpo-delta0,safedpo-delta5,anchored,limit-*} --data toy \
    --json $results/limit.json > $out/logs/limit.txt
judged=$(ls -d $out/neighbours/*/* | grep -v -e -data -e -round)
for seed in $(ls $out/neighbours); do
    judged+=" $out/village/$seed/safedpo-delta5"
done
python eval.py $judged --data toy --json $results/neighbours.json > $out/logs/neighbours.txt

if [ -n "${XSTEST:-}" ]; then
    each xstest "$all" <<END
safedpo-delta5 --data $XSTEST
END
    each xstest "$all" <<END
dpo-helpful --data $XSTEST --pairs helpful
dpo-harmless --data $XSTEST --pairs harmless
noswap-delta5 --data $XSTEST --pairs noswap --delta 5
END
    python eval.py $out/xstest/*/* --json $results/xstest.json > $out/logs/xstest.txt
fi

python -m village.theory --json $results/theory.json > $out/logs/theory.txt
python -m village.endpoints --json $results/endpoints.json > $out/logs/endpoints.txt
python -m village.figures --runs $out/village

processor=$(grep -m 1 -o "model name.*" /proc/cpuinfo | cut -d: -f2- || true)
torch=$(python -c "import torch; print(torch.__version__)")
echo "$(date -I): commit $(git log -1 --format=%h), torch $torch,$processor," \
    "$cores cores: $((SECONDS / 60)) min" | tee -a $results/made.txt
