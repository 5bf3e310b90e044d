# make setup   install into .venv          make train   the main job, small and offline, on two ranks
# make test    lint, types, every test     make test-slow   the longer checks
# make test-cluster   every launcher on several hosts made of namespaces; on Debian as root, skipped elsewhere
# make footprint   memory and network of full fine-tuning, LoRA and LIFT, counted; a refresh on several ranks
# make docs   the documentation as a site, in site/; strictly and without the network
# make speed   how fast principal weights are selected, and how fast a step is; tables, JSON and plots
# make gpu   checks and measurements on a GPU, in three parts of minutes; without one small, on the host

PYTHON ?= python3
VENV ?= .venv
RANKS ?= 2
# Files of tests that run at the same time. Many launch two ranks, so more of them wait for each other on few cores.
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/installed

# The variable silences a notice of Material's about its own future. Not --quiet: that would silence what --strict counts.
BUILD_DOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One thread a rank: two ranks on two cores otherwise fight over them.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup train test test-slow test-cluster footprint speed gpu lint docs clean

setup: $(STAMP)

# torch comes first: DeepSpeed's build reads its version, and an open range would fetch gigabytes of CUDA packages.
# Without CUDA, DeepSpeed's two host kernels are compiled here once, into the environment, instead of at first use by
# every rank; with CUDA, DeepSpeed compiles what it needs at first use. pip's cache may hold a wheel without them.
$(STAMP): pyproject.toml setup.py lift_ds/index/kernels/host_access.c constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"lift_ds needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; name another by PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja
	host=$$($(BIN)/python -c 'import torch; print(int(not torch.cuda.is_available()))') && \
	PATH="$(abspath $(BIN)):$$PATH" DS_BUILD_CPU_ADAM=$$host DS_BUILD_SHM_COMM=$$host \
	$(PIP) --no-build-isolation --no-cache-dir deepspeed
	$(PIP) --no-build-isolation --editable '.[trl,evaluation,development,benchmarks,docs]'
	touch $(STAMP)

train: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" deepspeed --num_accelerators $(RANKS) launch/train.py --deepspeed ds_configs/lift_zero2.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BUILD_DOCS)

docs: $(STAMP)
	$(BUILD_DOCS)

test: lint
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest -m "not slow and not cluster" --numprocesses $(TEST_PROCESSES) --dist loadfile

test-slow: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest -m "slow and not cluster"

test-cluster: $(STAMP)
	tests/cluster/install.sh $(abspath $(BIN))
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest -m cluster tests/cluster

footprint: $(STAMP)
	$(BIN)/python -m benchmarks.footprint
	$(BIN)/python -m benchmarks.footprint --checkpointing --vocabulary 1024 --stages 1,2,3 \
		--output benchmarks/results/footprint_checkpointing.json
	$(BIN)/python -m benchmarks.refresh_ranks

speed: $(STAMP)
	$(BIN)/python -m benchmarks.refresh
	$(BIN)/python -m benchmarks.step

gpu: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m benchmarks.gpu

clean:
	rm -rf $(VENV) build dist site *.egg-info lift_ds/index/kernels/_host*.so lift_output
