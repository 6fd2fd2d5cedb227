# cki_rec: every target sets up what it needs; nothing but Python 3.10 to 3.13 and pip is assumed.
.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-all lint format bench clean

VENV ?= .venv
BIN := $(VENV)/bin
ACCELERATOR ?= auto
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z%A-Z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv and install (ACCELERATOR=auto|cpu|cuda); nothing to do the second time
	@test -n "$(PYTHON)" || { echo "setup: no Python 3.10 to 3.13 found; name one: make setup PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) cki_rec/environment.py $(VENV) $(ACCELERATOR)

reproduce: reproduce-quickstart ## the main experiment on the embedded real data: table, report

reproduce-%: setup ## the experiment conf/experiment/NAME.yaml (RAW=path of its raw file), skipping what is done
	@$(BIN)/cki-rec evaluate -m experiment=$* $(if $(RAW),data.raw=$(RAW))
	@$(BIN)/cki-rec report name=$*

data-%: setup ## fetch (unless RAW=path names it) and encode one data set: make data-movielens_1m
	@$(BIN)/cki-rec prepare data=$* $(if $(RAW),data.raw=$(RAW),data.fetch=true)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## lint, types and tests
	$(BIN)/pytest -q --hypothesis-profile=fixed

test-all: lint ## the same with the slow tests
	$(BIN)/pytest -q --hypothesis-profile=search -m "slow or not slow"

bench: setup ## measure our own parts, write experiments/bench/bench.json
	@$(BIN)/cki-rec bench

clean: ## remove the environment, encoded data and runs
	rm -rf $(VENV) data/encoded experiments/runs .mypy_cache .ruff_cache .pytest_cache
