# make demo | test | faults | audit | bench | lint | types     (each creates .venv first where it is missing)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
FAULTS ?=

.PHONY: help install demo test faults audit bench lint types clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(READY) ## create .venv and install the project with its test tools

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[ray,export,dev]'
	touch $@

demo: $(READY) ## five hospitals with generated X-rays train one model under differential privacy (needs no data)
	$(BIN)/flower-simulate run --rounds 30

test: $(READY) ## the fast tests
	$(BIN)/python -m pytest -q -m 'not faults and not audit'

faults: $(READY) ## kill processes, corrupt files, cut runs short
	$(BIN)/python -m pytest -q -m faults $(if $(FAULTS),-k '$(FAULTS)')

audit: $(READY) ## long privacy audits
	$(BIN)/python -m pytest -q -m audit

bench: $(READY) ## measure speed beside the alternatives and rewrite docs/benchmarks.md: about half an hour on 2 idle cores
	$(BIN)/flower-simulate bench --full --write docs/benchmarks.md

lint: $(READY) ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## strict types
	$(BIN)/mypy

clean: ## remove the environment and caches, never runs
	rm -rf $(VENV) .mypy_cache .ruff_cache build *.egg-info
