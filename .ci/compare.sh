#!/usr/bin/env bash
# Every method from the same tiny student, with three seeds: of what both models learned from, the
# data, the sampling. Two runs at a time; one that is done is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS="0 1 2"

for seed in $SEEDS; do
    echo "seed-$seed seed=$seed"
done | xargs -P 2 -L 1 .ci/world.sh

# A method a line, its flags behind it. guided-random is a control: if candidates picked at random
# do as well, it is not the overlap that helps
for seed in $SEEDS; do
    while read -r method flags; do
        echo "compare/$method/seed-$seed seed-$seed $flags --seed $seed"
    done << 'END'
opd              --method opd
prefix           --method prefix
progressive      --method progressive
prefix-guided    --method prefix-guided
prune            --method prune
opd-extrapolate  --method opd --extrapolate
guided-random    --method prefix-guided --select random
END
done | xargs -P 2 -L 1 .ci/one_run.sh

.venv/bin/python opd.py --report out/compare | tee assets/compare.txt
cp out/compare/report.png assets/compare.png
