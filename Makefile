# Every target works on a fresh machine with Python 3.11 or newer: .venv is made when it is missing or out of date.
PYTHON ?= python3
OPD = .venv/bin/python opd.py
.PHONY: demo test bench compare conditions clean

# Teacher and student are made, and the student learns from the teacher: one to two minutes on a CPU.
demo: .venv/ready
	$(OPD) --output_dir out/demo

# Every claim, offline, on tiny models: two to four minutes.
test: .venv/ready
	.venv/bin/python -m pytest -q test_opd.py

# What opd.py takes, in seconds and bytes, beside the plainest way to do the same: under five minutes on two cores.
bench: .venv/ready
	.venv/bin/python test_opd.py bench

# Every method from the same tiny student, with three seeds: of what both models learned from, the data, the sampling.
# Two runs at a time; then a table and the picture out/compare/report.png. Broken off, it goes on with what is not done.
SEEDS = 0 1 2
METHODS = opd prefix progressive prefix-guided prune opd-extrapolate opd-budget prefix-guided-random
compare: .venv/ready
	$(MAKE) --no-print-directory -j2 $(foreach method,$(METHODS),$(SEEDS:%=out/compare/$(method)/seed-%/done))
	$(OPD) --report out/compare

FLAGS_opd-extrapolate = --method opd --extrapolate
# A control: opd on no more tokens than the cheapest method samples, which is prefix
FLAGS_opd-budget = --method opd --eval_every 5 --max_generated_tokens $$(grep -o '"generated_tokens": [0-9]*' \
	out/compare/prefix/$(*F)/metrics.jsonl | tail -n 1 | grep -o '[0-9]*$$')
$(SEEDS:%=out/compare/opd-budget/seed-%/done): out/compare/opd-budget/%/done: out/compare/prefix/%/done
# Another: candidates picked at random. If they do as well, it is not the overlap that helps
FLAGS_prefix-guided-random = --method prefix-guided --select random

.SECONDEXPANSION:
out/compare/%/done: out/world/$$(*F)
	$(call run,$(or $(FLAGS_$(*D)),--method $(*D)) --seed $(subst seed-,,$(*F)))

# A run with the flags $(1), in the world that its target depends on; if it fails, the end of its log is shown.
define run
rm -rf $(@D) && mkdir -p $(@D) && cp -r $< $(@D)/world
$(OPD) --output_dir $(@D) $(1) > $(@D)/log 2>&1 || { tail -n 3 $(@D)/log; exit 1; }
touch $@
endef

# What has to hold for OPD to work at all [Rethinking-OPD]: a teacher that writes as the student does, and knows more.
# A row's name ends in what the paper found.
CONDITIONS = 1-compatible--paper-learns 2-other-words--paper-learns-little 3-other-order--paper-learns-little \
	4-other-order-cold-start--paper-learns 5-reverse--paper-falls-back
conditions: .venv/ready
	$(MAKE) --no-print-directory -j2 $(CONDITIONS:%=out/conditions/%/done)
	$(OPD) --report out/conditions

FLAGS_4-other-order-cold-start--paper-learns = --cold_start_steps 20
out/conditions/%/done:
	$(call run,--method opd $(FLAGS_$*))
$(filter out/conditions/1%,$(CONDITIONS:%=out/conditions/%/done)): out/world/seed-0
$(filter out/conditions/2%,$(CONDITIONS:%=out/conditions/%/done)): out/world/other-words
$(filter out/conditions/3% out/conditions/4%,$(CONDITIONS:%=out/conditions/%/done)): out/world/other-order
$(filter out/conditions/5%,$(CONDITIONS:%=out/conditions/%/done)): out/world/reverse

# The student of seed 0 is in all worlds but seed-1 and seed-2. Its teachers: other favourite synonyms; "a +3 4" for
# "a 4 +3", taught for as long as it takes to solve as well; and the two models with their parts exchanged.
WORLD_other-words = , teacher_habit=6
WORLD_other-order = , teacher_order=-1, teacher_steps=250
.PRECIOUS: out/world/%
out/world/%: | .venv/ready
	mkdir -p out/world
	.venv/bin/python -c "import opd; opd.torch.set_num_threads(1); opd.make_world('$@', $(or $(patsubst seed-%,%,$(filter seed-%,$*)),0)$(WORLD_$*))"
out/world/reverse: out/world/seed-0
	rm -rf $@.partial && cp -r $< $@.partial
	cd $@.partial && mv student weak && mv teacher student && mv weak teacher
	mv $@.partial $@

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

# Everything that was made, but for .venv.
clean:
	rm -rf out __pycache__ .pytest_cache
