# Two commands do everything: `make quickstart` and `make test`. The rest is for those who change the code.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SEED ?= 0
VENV := .venv

.PHONY: quickstart test clean

quickstart: $(VENV)/installed
	$(VENV)/bin/python quickstart.py --seed $(SEED)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q

# The environment is whole when this file exists, and made again when the requirements change.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs
