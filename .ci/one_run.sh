#!/usr/bin/env bash
# one_run.sh NAME WORLD [FLAG ...]: runs opd.py in out/NAME, on a copy of out/world/WORLD, unless
# that run is done with the same flags. FLAGS="--max_steps 2" make compare: more flags for all runs.
set -euo pipefail
cd "$(dirname "$0")/.."
run=out/$1 world=out/world/$2
shift 2
told="$* ${FLAGS:-}"
if [ "$(cat "$run/done" 2> /dev/null)" = "$told" ]; then exit; fi

echo "running $run"
rm -rf "$run"
mkdir -p "$run"
cp -r "$world" "$run/world"
if ! .venv/bin/python opd.py --output_dir "$run" "$@" ${FLAGS:-} > "$run/log" 2>&1; then
    echo "failed; the end of $run/log:"
    tail -n 3 "$run/log"
    exit 255  # makes xargs start no more runs
fi
echo "$told" > "$run/done"
