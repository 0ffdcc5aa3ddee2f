# `make demo` and `make test` do everything on a fresh machine: they make the environment themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DOCS := $(VENV)/.ready-docs

.PHONY: demo test test-all test-gpu check docs release-check bench evidence evidence-small clean

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

# NO_MKDOCS_2_WARNING: mkdocs-material prints an advertisement otherwise.
docs: $(READY_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release-check: $(READY)
	$(BIN)/python scripts/release_check.py

# The study of docs/evidence.md: days on two CPU cores. evidence-small is a tenth of its tokens, with two seeds.
evidence: $(READY)
	$(BIN)/c2r harvest studies/smollm2-135m-harvest.yaml
	$(BIN)/c2r study studies/smollm2-135m.yaml
	$(BIN)/c2r study studies/smollm2-135m.yaml --set run.model.layer=12 output=runs/evidence/block12

evidence-small: $(READY)
	$(BIN)/c2r study studies/smollm2-135m.yaml --set output=runs/evidence/small 'seeds=[0, 1]' run.cache=null \
		run.train.tokens=1_500_000 evaluation.absorption.prompts.max_words=6000 evaluation.absorption.seeds=1

bench: $(READY)
	$(BIN)/python benchmarks/step.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

$(READY_DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $(READY_DOCS)

clean:
	rm -rf $(VENV) runs site
