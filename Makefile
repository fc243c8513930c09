# Every target works on a fresh machine with Python 3.11 or newer: .venv is made when it is missing or out of date.
PYTHON ?= python3
OPD = .venv/bin/python opd.py
WORLD = .venv/bin/python -c "import opd; opd.torch.set_num_threads(1); opd.make_world
.PHONY: demo test compare conditions clean

# Teacher and student are made, and the student learns from the teacher: about a minute on one CPU core.
demo: .venv/ready
	$(OPD) --output_dir out/demo

# Every claim, offline, on tiny models: about a minute.
test: .venv/ready
	.venv/bin/python -m pytest -q test_opd.py

# Every method from the same tiny student, with three seeds of its sampling and its data, then a table and the picture
# out/compare/report.png. Two runs at a time; broken off, it goes on with the runs that are not done.
SEEDS = 0 1 2
METHODS = opd prefix progressive prefix-guided prune opd-extrapolate opd-budget prefix-guided-random
compare: .venv/ready
	$(MAKE) --no-print-directory -j2 $(foreach method,$(METHODS),$(SEEDS:%=out/compare/$(method)/seed-%/done))
	$(OPD) --report out/compare

FLAGS_opd-extrapolate = --method opd --extrapolate
# A control: opd with no more tokens than the cheapest method sampled, which is prefix
FLAGS_opd-budget = --method opd --eval_every 5 --max_generated_tokens \
	$$(grep -o '"generated_tokens": [0-9]*' out/compare/prefix/$(@D:out/compare/opd-budget/%=%)/metrics.jsonl | tail -n 1 | grep -o '[0-9]*$$')
$(SEEDS:%=out/compare/opd-budget/seed-%/done): out/compare/opd-budget/%/done: out/compare/prefix/%/done
# Another: candidates picked at random. If they do as well, it is not the overlap that helps
FLAGS_prefix-guided-random = --method prefix-guided --select random

out/compare/%/done: out/world/compatible
	$(call run,$(firstword $(subst /seed-, ,$*)),--eval_every 10 --seed $(lastword $(subst /seed-, ,$*)))

# A run named $(1) with the flags $(2), in the world that its target depends on; its output is shown if it fails.
define run
rm -rf $(@D) && mkdir -p $(@D) && cp -r $< $(@D)/world
$(OPD) --output_dir $(@D) $(2) $(or $(FLAGS_$(1)),--method $(1)) > $(@D)/log 2>&1 || { tail -n 3 $(@D)/log; exit 1; }
touch $@
endef

# What decides whether OPD works at all: does the teacher write as the student does, and does it know more?
CONDITIONS = compatible other-style other-style-cold-start reverse
conditions: .venv/ready
	$(MAKE) --no-print-directory -j2 $(CONDITIONS:%=out/conditions/%/done)
	$(OPD) --report out/conditions

FLAGS_compatible = --note "a"
out/conditions/%/done:
	$(call run,$*,--eval_every 10 --probe_depths 0 25 50 75)
out/conditions/compatible/done: out/world/compatible
out/conditions/other-style/done out/conditions/other-style-cold-start/done: out/world/other-style
out/conditions/reverse/done: out/world/reverse

out/world/compatible:
	mkdir -p out/world
	$(WORLD)('$@', 0)"
out/world/other-style:
	mkdir -p out/world
	$(WORLD)('$@', 0, teacher_habit=6)"
out/world/reverse: out/world/compatible
	cp -r $< $@.partial
	mv $@.partial/student $@.partial/weak && mv $@.partial/teacher $@.partial/student && mv $@.partial/weak $@.partial/teacher
	mv $@.partial $@

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

# Everything that was made, but for .venv.
clean:
	rm -rf out __pycache__ .pytest_cache
