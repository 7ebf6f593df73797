# Two commands do everything: `make quickstart` and `make test`. The rest is for those who change the code.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SEED ?= 0
VENV := .venv

.PHONY: quickstart test bench clean

quickstart: $(VENV)/installed
	$(VENV)/bin/python quickstart.py --seed $(SEED)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q

# Beside other software and beside what the machine could do: PROMPTS is a .jsonl with "question" in each line, such as GSM8K's.
bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/generation.py --prompts_file $(PROMPTS) --out runs/generation.md
	$(VENV)/bin/python benchmarks/kernels.py
	$(VENV)/bin/python benchmarks/checkpoint_memory.py

# The environment is whole when this file exists, and made again when the requirements change.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs
