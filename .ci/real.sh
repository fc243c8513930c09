#!/usr/bin/env bash
# A real language model distils itself on a CPU: the student samples after the plain prompt; the
# same model with the solution in its prompt is the teacher [OPSD]. A run that is done with the same
# flags is skipped.
#     SMOL=folder SEEDS="0 1" STEPS=24 SAMPLES=4 .ci/real.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SMOL=${SMOL:-HuggingFaceTB/SmolLM2-135M-Instruct}
out=out/real
mkdir -p $out
head -n 400 assets/word_problems.jsonl > $out/train.jsonl
tail -n 100 assets/word_problems.jsonl > $out/eval.jsonl

# Which prompt makes it a useful teacher? The one of the last row is used here
if [ ! -e $out/prompts.txt ]; then
    .venv/bin/python .ci/teacher_prompts.py "$SMOL" $out/train.jsonl 24 > $out/prompts.part
    mv $out/prompts.part $out/prompts.txt
fi
cat $out/prompts.txt
asked='{problem} Please reason in one sentence, and put your final answer within \boxed{}.'
informed='Question: A pen costs 3 coins. What do 4 pens cost?
Answer: Each of 4 pens costs 3 coins: 4 * 3 = 12. The answer is \boxed{12}.

Question: {problem}
Answer: {solution}

Question: {problem}
Answer:'

learn() {  # method and seed, flags
    local run=$out/$1 told="$SMOL ${STEPS:-24} ${SAMPLES:-4} $2"
    if [ "$(cat "$run/done" 2> /dev/null)" = "$told" ]; then return; fi
    echo "running $run"
    # shellcheck disable=SC2086  # the flags are to be split into words
    if ! .venv/bin/python opd.py --student "$SMOL" --teacher_prompt_template "$informed" \
        --prompt_template "$asked" --train_file $out/train.jsonl --eval_file $out/eval.jsonl \
        --batch_size 3 --num_generations 4 --max_new_tokens 48 --segment_length 16 \
        --prefix_length 16 --probe_window 16 --cap_init 48 --cap_min 16 --cap_max 48 --cap_step 8 \
        --cap_margin 8 --w_drop .05 --learning_rate 1e-4 --warmup_steps 4 \
        --temperature .7 --max_steps "${STEPS:-24}" \
        --micro_batch_size 12 --eval_every 0 --eval_samples "${SAMPLES:-4}" \
        --eval_max_new_tokens 48 --eval_batch_size 100 --output_dir "$run" $2 \
        > "$out/${1/\//-}.log" 2>&1; then
        tail -n 3 "$out/${1/\//-}.log"
        exit 1
    fi
    echo "$told" > "$run/done"
}

# Only the first run evaluates the untrained models: they are the same in all runs
first=both
for seed in ${SEEDS:-0 1}; do
    while read -r name flags; do
        learn "$name/seed-$seed" "$flags --seed $seed --eval_first $first"
        first=none
    done << 'END'
opd            --method opd --loss forward_kl
prefix         --method prefix --loss forward_kl
prefix-guided  --method prefix-guided --loss forward_kl
prune          --method prune --loss forward_kl
reverse-kl     --method opd --loss reverse_kl
END
done
.venv/bin/python opd.py --report $out
.venv/bin/python .ci/real.py $out > assets/real.txt
cat assets/real.txt
