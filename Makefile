# `make demo` and `make test` do everything on a fresh machine: they make the environment themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all test-gpu check bench clean

demo: $(READY)
	$(BIN)/c2r demo --out runs/demo

test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-all: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not gpu"

test-gpu: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python benchmarks/step.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs
