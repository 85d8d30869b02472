# One command each, on a machine with only Python (3.11 or newer) and make. Every target sets up what it needs.

PYTHON ?= python3
ARGS ?=
VENV := .venv
STAMP := $(VENV)/.installed
STARTED := $(shell date +%s)

# DeepSpeed looks for ninja on PATH, and keeps compiled ops per checkout, not per user.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.torch_ext
# Never unset: Ray would write a token into the home directory and then ask every later cluster for it.
export RAY_AUTH_MODE ?= disabled

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo '  ARGS="..." goes to rxt run (quickstart) or pytest (test); PYTHON=python3.12 picks the interpreter.'

install: $(STAMP)  ## create .venv with the package, its dependencies and the dev tools

$(STAMP): pyproject.toml constraints.txt
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: need Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1); run: make PYTHON=python3.11 $(or $(MAKECMDGOALS),install)" >&2; \
	    exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV); }
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: $(STAMP)  ## train a tiny model through the whole pipeline; prints install and run seconds
	@installed=$$(date +%s); \
	$(VENV)/bin/rxt run pipelines/configs/quickstart.yaml $(ARGS) || exit $$?; \
	echo "quickstart: install $$((installed - $(STARTED))) s, run $$(($$(date +%s) - installed)) s"

test: $(STAMP)  ## run the tests, e.g. make test ARGS="tests/unit -k memory"
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS)

lint: $(STAMP)  ## style, formatting, types, and the import walls between rooms
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy rxt_platform
	$(VENV)/bin/lint-imports

clean:  ## remove .venv, caches and build outputs (results in runs/ stay)
	rm -rf $(VENV) .torch_ext build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
