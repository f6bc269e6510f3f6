# Every target does its own set-up: a machine with Python >= 3.11 (pip and venv), git and make is enough.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test lint proofs atlas bench docs clean
.DEFAULT_GOAL := test

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

setup: .venv/.ready

demo: setup
	$(BIN)/neurograft demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proofs: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.proofs

atlas: setup
	$(BIN)/python -m neurograft.worlds.atlas_build

bench: setup
	$(BIN)/python benchmarks/train_step.py

docs: setup
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
