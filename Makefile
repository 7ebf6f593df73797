# Two commands do everything: `make quickstart` and `make test`. The rest is for those who change the
# code.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SEED ?= 0
VENV := .venv

.PHONY: quickstart smollm test lint faults bench gpu clean

quickstart: $(VENV)/installed
	$(VENV)/bin/python quickstart.py --seed $(SEED)

# A released model, improved by reinforcement alone: about an hour; SMALL=1 takes every step in five
# minutes.
smollm: $(VENV)/installed
	$(VENV)/bin/python smollm.py --seed $(SEED) $(if $(SMALL),--small)

# In two processes (tests/conftest.py says what goes where); shared launches wait their turn.
test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -n 2 --no-loadscope-reorder

# Form, types, spelling.
lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	git ls-files -z | xargs -0 $(VENV)/bin/codespell

# Kills, damage, full disks, hangs: all of it takes about half an hour; `make test` has a shorter
# cut.
faults: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -s tests/faults tests/trainer/test_saving.py --full-faults

# Beside other software and beside what the machine could do: PROMPTS is a .jsonl with "question" and
# "answer" in each line, such as GSM8K's train file.
bench: .venv-bench/installed .venv-bench-ppo/installed
	.venv-bench/bin/python benchmarks/generation.py --prompts_file $(PROMPTS) --out runs/generation.md
	.venv-bench/bin/python benchmarks/training.py --train_file $(PROMPTS) --out runs/training.md
	.venv-bench/bin/python benchmarks/ppo.py --train_file $(PROMPTS) --trl_python .venv-bench-ppo/bin/python --out runs/ppo.md
	.venv-bench/bin/python benchmarks/kernels.py
	.venv-bench/bin/python benchmarks/checkpoint_memory.py

# A GPU's correctness and speed in eight minutes, into runs/gpu; SMALL=1 tries every stage with tiny
# models, on a CPU too. With WHEELS, a folder, the machine's own Python and torch are taken, and
# what they lack comes from there: no package index is asked.
GPU_PYTHON := $(if $(WHEELS),python3,$(VENV)/bin/python)
gpu: $(if $(WHEELS),runs/gpu/site,$(VENV)/installed)
	PYTHONPATH=$(if $(WHEELS),runs/gpu/site) $(GPU_PYTHON) benchmarks/gpu.py $(if $(SMALL),--small)

runs/gpu/site: $(if $(WHEELS),$(wildcard $(WHEELS)/*.whl))
	python3 -m pip install --quiet --no-index --no-deps --upgrade --target $@ $^
	touch $@

.venv-bench/installed: requirements.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r benchmarks/requirements.txt
	touch $@

# TRL's PPOTrainer needs another version of TRL, in an environment of its own.
.venv-bench-ppo/installed: benchmarks/requirements-ppo.txt
	$(PYTHON) -m venv .venv-bench-ppo
	.venv-bench-ppo/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements-ppo.txt
	touch $@

# The environment is whole when this file exists, and made again when the requirements change.
$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-bench .venv-bench-ppo runs
