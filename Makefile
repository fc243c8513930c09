# Needs Python 3.11 or newer; .venv is made if missing or out of date. Times are on two CPU cores.
PYTHON ?= python3
.PHONY: demo test lint bench premises compare conditions real clean

# Makes a tiny teacher and a tiny student and distils one into the other: two to three minutes.
demo: .venv/ready
	.venv/bin/python opd.py --output_dir out/demo

# All tests, offline, on tiny models: two minutes. Two workers.
test: .venv/ready
	.venv/bin/python -m pytest -q -n 2 --dist worksteal test_opd.py .ci/test_*.py

# Checks the format of all Python files, and for common mistakes: one second. Silent if all is well.
lint: .venv/ready
	@.venv/bin/ruff format --quiet --check *.py .ci/*.py
	@.venv/bin/ruff check --quiet *.py .ci/*.py

# Time and memory of opd.py, compared with the plainest way to do the same: eight minutes.
bench: .venv/ready
	.venv/bin/python .ci/bench.py

# Do the papers' premises hold in the tiny world? Six minutes.
premises: .venv/ready
	.venv/bin/python .ci/premises.py out/premises && cp out/premises/premises.txt assets/

# Every method with five seeds, a table and a picture: 25 minutes. If interrupted, run it again.
compare: .venv/ready
	.ci/compare.sh

# When does OPD work? Teachers, a cold start, learning rates, stops, its own teacher: 12 minutes.
conditions: .venv/ready
	.ci/conditions.sh

# A real model of 135M parameters distils itself: 90 minutes a seed, two seeds. SMOL=folder: no hub.
real: .venv/ready
	.ci/real.sh

# Removes out/ and all caches, but not .venv: one second.
clean:
	rm -rf out __pycache__ .ci/__pycache__ .pytest_cache .ruff_cache

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@
