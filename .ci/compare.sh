#!/usr/bin/env bash
# Every method with five seeds. A seed sets what both models were trained on, the problems and the
# sampling: its methods share one student. Two runs at a time; those that are done are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS="0 1 2 3 4"

for seed in $SEEDS; do
    echo "seed-$seed seed=$seed"
done | xargs -P 2 -L 1 .ci/world.sh

# A world with a single training problem
for seed in $SEEDS; do
    one=out/world/seed-$seed-one
    if [ -e $one ]; then continue; fi
    rm -rf $one.partial
    cp -r out/world/seed-$seed $one.partial
    head -n 1 out/world/seed-$seed/train.jsonl > $one.partial/train.jsonl
    mv $one.partial $one
done

# One method per line: name, world, flags. The prefixes are the papers' shares of the cap, 256.
# guided-random and one-prompt are controls. Plain OPD is also evaluated on the way, for its curve
end="--eval_first none --eval_every 0"
for seed in $SEEDS; do
    while read -r method world flags; do
        echo "compare/$method/seed-$seed seed-$seed$world --no_view --seed $seed $flags"
    done << END
opd              - --method opd --eval_every 5
prefix-2%        - --method prefix --prefix_length 5 $end
prefix-10%       - --method prefix --prefix_length 26 $end
prefix-25%       - --method prefix --prefix_length 64 $end
progressive      - --method progressive $end
prefix-guided    - --method prefix-guided $end
guided-random    - --method prefix-guided --select random $end
prune            - --method prune $end
opd-extrapolate  - --method opd --extrapolate $end
one-prompt       -one --method opd $end
END
done | sed 's/\(seed-[0-9]\)- /\1 /' | xargs -P 2 -L 1 .ci/one_run.sh

.venv/bin/python .ci/compare.py out/compare assets/compare.png > out/compare/table.txt
cp out/compare/table.txt assets/compare.txt
cat assets/compare.txt
