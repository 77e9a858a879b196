# Every target with a line of help: make help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Of the commands reproduce-...: the size; runs side by side; ranks of each run (auto: all GPUs found);
# where runs/ and summary/ are; DRY=1 prints the plan and the commands.
SCALE = full
JOBS = $(if $(filter smoke,$(SCALE)),2,1)
RANKS = $(if $(filter full,$(SCALE)),auto)
RESULTS = $(if $(filter smoke,$(SCALE)),results/smoke,results)
DRY :=
EXPERIMENTS := $(notdir $(basename $(wildcard configs/experiment/*.yaml)))

.DEFAULT_GOAL := help
.PHONY: help install demo fuzz test test-processors test-fast lint format theory bench bench-optimizer bench-plan bench-cost bench-step-cost bench-distributed bench-first-contact $(EXPERIMENTS:%=reproduce-%) reproduce-imagenet-r50 reproduce-imagenet-vit reproduce-cifar10-r18 reproduce-cifar100-r18 reproduce-cifar100-deit reproduce-cifar10-vit reproduce-all gpu-check doctor bench-data prepare-imagenet claims summaries predictions judge report report-diff notebooks documents clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-21s %s\n", $$1, $$2}'
	@printf "  make %-21s %s\n" "reproduce-<experiment>" "one experiment (SCALE=full, JOBS=1, RANKS=, DRY=): $(EXPERIMENTS)"

# Modules are compiled when they are first imported, not all of them here. Where writing bytecode is
# forbidden, as in many containers, every process would compile all of torch that it imports.
unexport PYTHONDONTWRITEBYTECODE
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"Python 3.10 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}: use make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[suite,dev]'
	@$(BIN)/python -c 'import experiments.reproduce, experiments.training.trainer, torch._dynamo, torchvision, timm'
	@touch $@

install: $(STAMP) ## make .venv and install everything under the pins of constraints.txt

demo: $(STAMP) ## train SGD, Adam, KFAC, sL-BFGS, SLIM-QN and mL-BFGS on handwritten digits, 3 seeds each, and compare (2 minutes)
	$(BIN)/python -m experiments.reproduce digits_mlp --results-dir results/demo

# Test files side by side, one thread each.
TESTS := 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TESTS) --dist loadfile

test: lint ## lint, types and the whole test suite (TESTS=2 files side by side)
	$(PYTEST)

test-processors: $(STAMP) ## every bit-equality test on emulated processors (ARGS=--quick: two of them, the optimizer alone)
	$(BIN)/python -m tests.processors $(ARGS)

test-fast: $(STAMP) ## the tests that take less than ten seconds each
	$(PYTEST) -m 'not slow'

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

theory: $(STAMP) ## settle every claim that needs no training; page of verdicts in results/theory (about 4 minutes)
	$(BIN)/python -m experiments.theory

EXAMPLES := 1000
fuzz: $(STAMP) ## feed EXAMPLES generated inputs to commands and readers (1000: about 5 minutes); counts in results/benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing --examples $(EXAMPLES) --out results/benchmarks/fuzzing.json

bench: bench-optimizer bench-cost bench-distributed bench-first-contact ## all benchmarks

bench-optimizer: $(STAMP) ## time of one optimizer step against its floor in memory traffic (about 8 minutes)
	$(BIN)/python -m experiments.benchmarks.optimizer_step

bench-cost: $(STAMP) ## what one step of every optimizer costs beside a forward and backward pass (about 8 minutes)
	$(BIN)/python -m experiments.benchmarks.optimizer_cost

bench-step-cost: $(STAMP) ## one step of each optimizer on ResNet-50 at 224 px, batch 64, beside the paper's ratios
	$(BIN)/python -m experiments.benchmarks.optimizer_cost --experiment imagenet_resnet50 --batch 64 --optimizers sgd,adam,kfac,slimqn,mlbfgs --rounds 3 --apart --threads 2 --name step_cost_resnet50

bench-distributed: $(STAMP) ## what each rank keeps and what ranks tell each other, at 1, 2 and 4 ranks (about 5 minutes)
	$(BIN)/python -m experiments.benchmarks.distributed

bench-first-contact: $(STAMP) ## the optimizers at their defaults on five small problems, beside SGD and AdamW (about 12 minutes)
	$(BIN)/python -m experiments.benchmarks.first_contact

gpu-check: $(STAMP) ## try everything on one GPU for ten minutes (ARGS="--device cpu"); one JSON
	scripts/gpu_check.sh $(ARGS)

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
	  optimizer.distribution=blocks > results/benchmarks/plan.tmp
	@mv results/benchmarks/plan.tmp results/benchmarks/plan_resnet50_blocks.txt
	$(BIN)/python -m experiments.plan $(PLAN) optimizer.distribution=sharded > results/benchmarks/plan.tmp
	@mv results/benchmarks/plan.tmp results/benchmarks/plan_resnet50_sharded.txt

# The papers' tables and figures, resumed when typed again. At full scale a run trains on all GPUs found.
reproduce = $(BIN)/python -m experiments.reproduce $(1) --scale $(SCALE) --jobs $(JOBS) \
	$(if $(RANKS),--ranks $(RANKS)) --results-dir $(RESULTS) $(if $(DRY),--plan)

# Ours: questions of mechanism, asked at the size of a CPU.
reproduce-controls reproduce-released reproduce-deviations: SCALE = reduced
$(EXPERIMENTS:%=reproduce-%): reproduce-%: $(STAMP)
	$(call reproduce,$*)

# On a CPU as on eight GPUs: several ranks of torchrun, which talk through gloo.
reproduce-imagenet-r50 reproduce-imagenet-vit: RANKS = $(if $(filter smoke,$(SCALE)),2,$(if $(filter full,$(SCALE)),auto))
reproduce-imagenet-r50 reproduce-imagenet-vit: JOBS = 1
reproduce-imagenet-r50: $(STAMP) ## ResNet-50 on ImageNet: mL-BFGS paper, Table 4 and Figure 4; SLIM-QN paper, Figure 2
	$(call reproduce,imagenet_resnet50 imagenet_resnet50_slimqn)

reproduce-imagenet-vit: reproduce-imagenet_vit ## ViT on ImageNet: SLIM-QN paper, Figure 3

reproduce-cifar10-r18: $(STAMP) ## ResNet-18 on CIFAR-10: mL-BFGS paper, Table 3; SLIM-QN paper, Figure 5
	$(call reproduce,cifar10_resnet18 cifar10_resnet18_slimqn)

reproduce-cifar100-r18: reproduce-cifar100_resnet18 ## ResNet-18 on CIFAR-100: mL-BFGS paper, Table 3

reproduce-cifar100-deit: reproduce-cifar100_deit_tiny ## DeiT-Tiny on CIFAR-100: mL-BFGS paper, Table 3

reproduce-cifar10-vit: reproduce-cifar10_vit ## ViT on CIFAR-10: SLIM-QN paper, Figure 6

reproduce-all: $(STAMP) ## every claim that needs training, and the page over all claims (SCALE=smoke: on generated data)
	$(call reproduce,all)

claims: $(STAMP) ## judge every claim by the runs in RESULTS: summary/README.md and summary/claims.json
	$(BIN)/python -m experiments.analysis $(RESULTS) --all

predictions: $(STAMP) ## count the runs that claims need: results/predictions.json (2 minutes)
	$(BIN)/python -m experiments.predictions

summaries: $(STAMP) ## tables, figures and verdicts of every experiment with runs in RESULTS
	$(BIN)/python -m experiments.analysis $(RESULTS) --summaries

judge: summaries claims ## judge every experiment and claim, then bring README and docs up to date
	$(BIN)/python -m experiments.analysis.documents

report: $(STAMP) ## results/report/index.html, a static tree of pages, from the committed results alone (seconds)
	$(BIN)/python -m experiments.analysis.documents --check
	$(BIN)/python -m experiments.report

report-diff: $(STAMP) ## what changed from A=results directory to B=results directory
	@$(if $(and $(A),$(B)),,$(error usage: make report-diff A=/path/to/results B=results))
	$(BIN)/python -m experiments.report diff "$(A)" "$(B)"

notebooks: $(STAMP) ## bring the notebooks and their text (notebooks/*.py) together
	$(BIN)/jupytext --sync notebooks/*.py

documents: $(STAMP) ## put the committed tables into README.md and docs/
	$(BIN)/python -m experiments.analysis.documents

clean: ## remove the environment, caches and the demo's results
	rm -rf $(VENV) results/demo .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
