# `make demo` and `make test` need only Python 3.11 or later, git and make: they create .venv and install what is pinned.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types bench docs wheel stress clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,examples,compact,docs,lightning]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/digits.py --output demo_output

test: $(STAMP) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

bench: $(STAMP)
	$(BIN)/python benchmarks/run_all.py

docs: $(STAMP)
	$(BIN)/python -m sphinx -n -W -b html docs site

wheel:  # builds it and tries it in an empty environment
	$(PYTHON) tests/wheel.py

stress: $(STAMP)  # what takes too long for the tests
	OMP_NUM_THREADS=1 $(BIN)/python tests/stress_storage.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/stress_checkpoint.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo_output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
