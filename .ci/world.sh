#!/usr/bin/env bash
# world.sh NAME [ARGUMENT=VALUE ...]: calls make_world of opd.py with these arguments to make
# out/world/NAME, unless it exists.
set -euo pipefail
cd "$(dirname "$0")/.."
world=out/world/$1
shift
if [ -e "$world" ]; then exit; fi

echo "making $world"
mkdir -p out/world
make="import opd; opd.torch.set_num_threads(1); opd.make_world('$world'$(printf ', %s' "$@"))"
if ! .venv/bin/python -c "$make" > "$world.log" 2>&1; then
    tail -n 3 "$world.log"
    exit 255  # makes xargs start no more worlds
fi
