# cki_rec: every target sets up what it needs; nothing but Python 3.10 to 3.13 and pip is assumed.
.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-all lint format docs bench bench-peers bench-fuxictr bench-recbole bench-zoo gpu-check clean

VENV ?= .venv
BIN := $(VENV)/bin
ACCELERATOR ?= auto
PARALLEL ?= -n auto --maxprocesses 8 --dist loadfile # PARALLEL= runs tests one after the other
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z%A-Z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv and install (ACCELERATOR=auto|cpu|cuda); nothing to do the second time
	@test -n "$(PYTHON)" || { echo "setup: no Python 3.10 to 3.13 found; name one: make setup PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) cki_rec/environment.py $(VENV) $(ACCELERATOR)

reproduce: reproduce-quickstart ## the main experiment on the embedded real data: table, report

CONFIG_DIR = $(patsubst %/experiment/$*.yaml,--config-dir %,$(wildcard experiments/*/conf/experiment/$*.yaml))
reproduce-%: setup ## the experiment conf/experiment/NAME.yaml (RAW=path of its raw file), skipping what is done
	@$(BIN)/cki-rec evaluate -m $(CONFIG_DIR) experiment=$* $(if $(RAW),data.raw=$(RAW))
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

# pytest keeps the compiled tests for the next run, also where the environment forbids bytecode.
test test-all: export PYTHONDONTWRITEBYTECODE =
# There are as many test processes as cores.
test test-all: export OMP_NUM_THREADS = 1

test: lint ## lint, types and tests
	$(BIN)/pytest -q --hypothesis-profile=fixed $(PARALLEL)

test-all: lint ## the same with the slow tests
	$(BIN)/pytest -q --hypothesis-profile=search $(PARALLEL) -m "slow or not slow"

docs: setup $(VENV)/docs-installed ## build the documentation site, strictly: build/site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "docs: build/site/index.html"

$(VENV)/docs-installed: pyproject.toml
	@echo "docs: installing mkdocs-material and mkdocstrings"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

bench: setup ## measure our own parts (SELECT=name: one), write experiments/bench/bench.json
	@$(BIN)/python experiments/bench/run.py $(SELECT)

gpu-check: setup ## on a machine with GPUs: run their tests, train, merge, compare with the CPU
	@$(BIN)/python experiments/gpu/run.py

PEERS := experiments/peers
EXPORTED := experiments/runs/peers
ML_1M = $(or $(RAW),$(and $(CKI_REC_DATA),$(wildcard $(CKI_REC_DATA)/ml-1m.zip)))

bench-peers: setup .venv-peers/installed bench-fuxictr bench-recbole ## compare with deepctr-torch, FuxiCTR and RecBole, in environments of their own (RAW=path/to/ml-1m.zip adds ML-1M)
	@$(MAKE) --no-print-directory peers-movielens_small RAW=
	@$(if $(ML_1M),$(MAKE) --no-print-directory peers-movielens_1m RAW=$(ML_1M),\
		echo "bench-peers: MovieLens 1M is left out; make bench-peers RAW=path/to/ml-1m.zip adds it")
	@$(BIN)/python $(PEERS)/table.py $(EXPORTED) experiments/runs $(PEERS)/results.jsonl $(PEERS)/table.md

peers-%: # both sides of one data set; finished runs are kept
	@$(BIN)/python $(PEERS)/export.py $(EXPORTED) peers_$* $(if $(RAW),data.raw=$(RAW))
	@.venv-peers/bin/python $(PEERS)/peer.py $(EXPORTED)/peers_$* $(PEERS)/results.jsonl
	@$(BIN)/cki-rec evaluate -m experiment=peers_$* $(if $(RAW),data.raw=$(RAW))

.venv-peers/installed: experiments/peers/requirements.txt
	@echo "bench-peers: installing deepctr-torch in .venv-peers"
	@$(PYTHON) -m venv --clear .venv-peers
	@.venv-peers/bin/pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --requirement $<
	@touch $@

bench-fuxictr: setup .venv-fuxictr/installed ## the speed part of bench-peers: training steps beside FuxiCTR's
	@$(BIN)/python $(PEERS)/speed.py .venv-fuxictr/bin/python $(PEERS)/speed.md

BEAUTY ?= $(and $(CKI_REC_DATA),$(wildcard $(CKI_REC_DATA)/amazon-beauty-seq.zip))

bench-recbole: setup .venv-recbole/installed ## HR@k and NDCG@k of SASRec and GRU4Rec beside RecBole's (BEAUTY=path/to/amazon-beauty-seq.zip), a part of bench-peers
	@$(if $(BEAUTY),$(MAKE) --no-print-directory recbole-sasrec recbole-gru4rec,\
		echo "bench-recbole: is left out; BEAUTY=path/to/amazon-beauty-seq.zip adds it")

recbole-%: # both sides of one model; finished runs are kept
	@$(BIN)/python $(PEERS)/export_ranks.py $(EXPORTED) sequential_amazon_beauty $* data.raw=$(BEAUTY)
	@.venv-recbole/bin/python $(PEERS)/recbole_ranks.py $(EXPORTED)/$* $(PEERS)/ranks.jsonl
	@$(BIN)/cki-rec evaluate -m experiment=sequential_amazon_beauty model=$* data.raw=$(BEAUTY) \
		name=sequential_$* suite=single merge=best_source
	@$(BIN)/cki-rec report name=sequential_$*

bench-zoo: setup .venv-zoo/installed ## merge model definitions of other packages, in an environment of its own (SELECT="NAME ...": some)
	@PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 .venv-zoo/bin/python experiments/zoo/run.py \
		experiments/zoo/results.jsonl experiments/zoo/table.md $(SELECT)

# They see the packages of our environment, so that torch is installed once; ours sees none of theirs.
.venv-zoo/installed: experiments/zoo/requirements.txt
.venv-fuxictr/installed: experiments/peers/requirements-fuxictr.txt
.venv-recbole/installed: experiments/peers/requirements-recbole.txt
.venv-zoo/installed .venv-fuxictr/installed .venv-recbole/installed:
	@echo "installing packages of others in $(@D)"
	@$(BIN)/python -m venv --clear $(@D)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

clean: ## remove the environments, encoded data and runs
	rm -rf $(VENV) .venv-peers .venv-fuxictr .venv-recbole .venv-zoo data/encoded experiments/runs .mypy_cache .ruff_cache .pytest_cache
