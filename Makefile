# Every target works on a fresh machine with Python 3.11 or newer: .venv is made when it is missing or out of date.
PYTHON ?= python3
.PHONY: demo test compare clean

# Teacher and student are made, and the student learns from the teacher: about a minute on one CPU core.
demo: .venv/ready
	.venv/bin/python opd.py --output_dir out/demo

# Every claim, offline, on tiny models: half a minute.
test: .venv/ready
	.venv/bin/python -m pytest -q test_opd.py

# Each method once in the same tiny world, then one table and out/compare/report.png: about six minutes.
METHODS = opd prefix progressive prefix-guided prune
compare: $(METHODS:%=out/compare/%/done)
	.venv/bin/python opd.py --report out/compare

# A broken-off comparison goes on with the first method that is not done.
out/compare/%/done: out/demo/world | .venv/ready
	rm -rf out/compare/$*
	mkdir -p out/compare/$*
	cp -r out/demo/world out/compare/$*/world
	.venv/bin/python opd.py --output_dir out/compare/$* --method $* --eval_every 10
	touch $@

out/demo/world:
	$(MAKE) demo

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

# Everything that was made, but for .venv.
clean:
	rm -rf out __pycache__ .pytest_cache
