# Every target with a line of help: make help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Of the commands reproduce-...: runs side by side, and where runs/ and summary/ are.
JOBS := 1
RESULTS := results

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast lint format theory bench bench-optimizer bench-plan bench-cost bench-distributed reproduce-controls reproduce-released reproduce-deviations doctor bench-data prepare-imagenet documents clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-21s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"Python 3.10 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}: use make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[suite,dev]'
	@touch $@

install: $(STAMP) ## make .venv and install everything under the pins of constraints.txt

demo: $(STAMP) ## train SGD, Adam, KFAC, sL-BFGS, SLIM-QN and mL-BFGS on handwritten digits, 3 seeds each, and judge (2 minutes)
	$(BIN)/python -m experiments.reproduce digits_mlp --results-dir results/demo

test: lint ## lint, types and the whole test suite
	$(BIN)/python -m pytest

test-fast: $(STAMP) ## the tests that take less than ten seconds each
	$(BIN)/python -m pytest -m 'not slow'

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

theory: $(STAMP) ## settle every claim that needs no training; page of verdicts in results/theory (about 4 minutes)
	$(BIN)/python -m experiments.theory

bench: bench-optimizer bench-cost bench-distributed ## all benchmarks

bench-optimizer: $(STAMP) ## time of one optimizer step against its floor in memory traffic (about 8 minutes)
	$(BIN)/python -m experiments.benchmarks.optimizer_step

reproduce-controls: SCALE = reduced
reproduce-controls: $(STAMP) ## curvature or step length? mL-BFGS against controls without curvature (SCALE=reduced, JOBS=1)
	$(BIN)/python -m experiments.reproduce controls --scale $(SCALE) --jobs $(JOBS) --results-dir $(RESULTS)

bench-cost: $(STAMP) ## what one step of every optimizer costs beside a forward and backward pass (about 8 minutes)
	$(BIN)/python -m experiments.benchmarks.optimizer_cost

bench-distributed: $(STAMP) ## what each rank keeps and what ranks tell each other, at 1, 2 and 4 ranks (about 5 minutes)
	$(BIN)/python -m experiments.benchmarks.distributed

reproduce-released: SCALE = reduced
reproduce-released: $(STAMP) ## the released code's departures, switched on and off one at a time (SCALE=reduced, JOBS=1)
	$(BIN)/python -m experiments.reproduce released --scale $(SCALE) --jobs $(JOBS) --results-dir $(RESULTS)

reproduce-deviations: SCALE = reduced
reproduce-deviations: $(STAMP) ## what our reading of an unclear place changes, one at a time (SCALE=reduced, JOBS=1)
	$(BIN)/python -m experiments.reproduce deviations --scale $(SCALE) --jobs $(JOBS) --results-dir $(RESULTS)

doctor: $(STAMP) ## what this machine has and what a run needs (ARGS="experiment=cifar10_resnet18")
	$(BIN)/python -m experiments.doctor $(ARGS)

bench-data: $(STAMP) ## images a second beside torchvision's, on MLBFGS_DATA (about 5 minutes)
	$(BIN)/python -m experiments.benchmarks.data

prepare-imagenet: $(STAMP) ## SRC=originals DST=folder: check and resize every image once (ARGS="--form raw")
	@$(if $(and $(SRC),$(DST)),,$(error usage: make prepare-imagenet SRC=/path/to/originals DST=/path/to/prepared))
	$(BIN)/python -m experiments.data.prepare "$(SRC)" "$(DST)" $(ARGS)

PLAN := dataset=imagenet --model torchvision:resnet50 train.batch_size=512 optimizer=mlbfgs \
	optimizer.update_interval=50 launch.nproc=8

bench-plan: $(STAMP) ## what ResNet-50 needs on 8 GPUs, counted on none (half a minute)
	$(BIN)/python -m experiments.plan $(PLAN) 'optimizer.blocks="resblocks:2"' \
	  optimizer.distribution=blocks > results/benchmarks/plan_resnet50_blocks.txt
	$(BIN)/python -m experiments.plan $(PLAN) optimizer.distribution=sharded \
	  > results/benchmarks/plan_resnet50_sharded.txt

documents: $(STAMP) ## put the committed tables into README.md and docs/
	$(BIN)/python -m experiments.analysis.documents

clean: ## remove the environment, caches and the demo's results
	rm -rf $(VENV) results/demo .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
