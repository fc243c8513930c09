# Needs Python 3.11 or newer: .venv is made when missing or out of date. Times are of two CPU cores.
PYTHON ?= python3
.PHONY: demo test lint bench premises compare conditions real clean

# A tiny teacher and student are made, and one learns from the other: two to three minutes.
demo: .venv/ready
	.venv/bin/python opd.py --output_dir out/demo

# Every claim, offline, on tiny models: two minutes. Three workers: some tests wait.
test: .venv/ready
	.venv/bin/python -m pytest -q -n 3 --dist worksteal test_opd.py .ci/test_*.py

# The layout of all Python files, and the usual mistakes: one second. Silent where all is well.
lint: .venv/ready
	@.venv/bin/ruff format --quiet --check *.py .ci/*.py
	@.venv/bin/ruff check --quiet *.py .ci/*.py

# Seconds and bytes of opd.py, beside the plainest way to do the same: eight minutes.
bench: .venv/ready
	.venv/bin/python .ci/bench.py

# Does what the papers build on hold in the tiny world? Five minutes.
premises: .venv/ready
	.venv/bin/python .ci/premises.py out/premises && cp out/premises/premises.txt assets/

# Every method with five seeds, a table and a picture: 25 minutes. Broken off, it goes on.
compare: .venv/ready
	.ci/compare.sh

# When does OPD work at all? The same student with five teachers: six minutes.
conditions: .venv/ready
	.ci/conditions.sh

# A real language model of 135M parameters teaches itself: 90 minutes. SMOL=folder without a hub.
real: .venv/ready
	.ci/real.sh

# Everything that was made, but for .venv: one second.
clean:
	rm -rf out __pycache__ .ci/__pycache__ .pytest_cache .ruff_cache

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@
