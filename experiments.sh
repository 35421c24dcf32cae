#!/usr/bin/env bash
# Every run behind the README's tables: three seeds each, all runs of a seed from one reference.
#
#     ./experiments.sh                 prints each command before it runs; what is finished is not run again
#     CORES=8 ./experiments.sh         so many runs at a time, one thread each (left out: all cores)
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
seeds="9 10 11"
out=runs/experiments

run() {  # run SEED NAME FLAGS…: start it, or go on with it
    local folder=$out/seed$1/$2 log=$out/logs/seed$1-$2
    [ -f "$folder/eval.json" ] && return
    local command=(python train.py --seed "$1" --out_dir "$folder" "${@:3}")
    [ -f "$folder/config.json" ] && command+=(--resume)
    echo "${command[*]}"
    "${command[@]}" > "$log.txt" 2> "$log.err" || { tail -n 1 "$log.err"; return 255; }  # 255 ends xargs
}
export -f run
export out

mkdir -p "$out/logs" results

each() {  # lines of NAME FLAGS…, each for all seeds
    while read -r line; do
        for seed in $seeds; do
            echo "$seed ${line//SEED/$seed}"
        done
    done | xargs -P "${CORES:-$(nproc)}" -L 1 bash -c 'run "$@"' run
}

# The first run of a seed also trains the reference by SFT; the others find it beside them.
each <<END
safedpo-delta5
END

each <<END
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
END

# SACPO's two stages: helpfulness first, then safety, from and against the result of the first.
each <<END
sacpo --pairs harmless --init_from $out/seedSEED/dpo-helpful/policy.pt
END

python eval.py $out/seed*/* --json results/village.json > results/village.txt
python eval.py $out/seed*/* --split unseen --json results/unseen.json > results/unseen.txt
python theory.py --json results/theory.json
