#!/usr/bin/env bash
# What has to hold for OPD to work at all [Rethinking-OPD]: a teacher that writes as the student
# does, and knows more. Two runs at a time; one that is done is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."

# The student is the same in all three. The teachers: the demo's; one of other favourite synonyms;
# one that writes "a 4 +3" for "a +3 4", taught for longer, which yet solves fewer
xargs -P 2 -L 1 .ci/world.sh << 'END'
seed-0       seed=0
other-words  seed=0 teacher_habit=6
other-order  seed=0 teacher_order=-1 teacher_steps=250
END

# In the fourth, student and teacher are exchanged
if [ ! -e out/world/reverse ]; then
    rm -rf out/world/reverse.partial
    cp -r out/world/seed-0 out/world/reverse.partial
    mv out/world/reverse.partial/student out/world/reverse.partial/weak
    mv out/world/reverse.partial/teacher out/world/reverse.partial/student
    mv out/world/reverse.partial/weak out/world/reverse.partial/teacher
    mv out/world/reverse.partial out/world/reverse
fi

# The paper: 1 learns, 2 and 3 learn little, 4 learns, 5 falls back
xargs -P 2 -L 1 .ci/one_run.sh << 'END'
conditions/1-compatible   seed-0
conditions/2-other-words  other-words
conditions/3-other-order  other-order
conditions/4-cold-start   other-order --cold_start_steps 20
conditions/5-reverse      reverse
END

.venv/bin/python opd.py --report out/conditions
