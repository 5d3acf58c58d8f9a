# Danlu: `make demo` on a fresh machine, `make test` for everything that needs no data and no minutes.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint messages clean

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[report,tensorboard]"
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/danlu quickstart

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

messages: $(VENV)/installed-test
	$(BIN)/python tests/messages.py update

clean:
	rm -rf $(VENV) build *.egg-info quickstart
