# make demo | test | test-all | check | bench | methods | gallery | faults | soak    in .venv, which the first of them makes
# make gpu STAGE=all|test|kernels|latency|train PYTHON=python3 [ARGS=...]    with the Python at hand: no venv, no network; ARGS=--dry: rehearsed

PYTHON ?= python3
STAGE ?= test
VENV := .venv
BIN := $(VENV)/bin
# Rows go to $OUT where it is set (and stay there between calls, so that a stage goes on where it stopped).
RESULTS = $${OUT:-benchmarks/results}
# Kept: compiling 200 files of tests and what they import takes each worker 10 seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-all check bench methods gallery faults soak gpu
.DELETE_ON_ERROR:

help:
	@sed -n '1,2p' Makefile

# pip compiling every module of every package is half of an install: importing what the commands import stores the bytecode they need.
IMPORTED := onnx, onnxruntime, onnxscript, safetensors.torch, scipy.linalg, tqdm, PIL.Image, torch.onnx, torch.export, torch._inductor.compile_fx

$(VENV)/installed: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[test]'
	$(BIN)/python -c "import $(IMPORTED)"
	touch $@

demo: $(VENV)/installed
	$(BIN)/fastcm train
	$(BIN)/fastcm sample runs/mnist --out runs/mnist/samples.png
	$(BIN)/fastcm evaluate runs/mnist --data mnist
	$(BIN)/fastcm export runs/mnist --onnx runs/mnist/mnist.onnx

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not long"

# What takes minutes: full fuzzing, long compilations, kills with counts. Beside make test, not instead of it.
test-all: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist worksteal -m "long"

# Before a commit: style, the house rules, and the tests that take seconds.
check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not long and not gpu"

bench: $(VENV)/installed
	mkdir -p "$(RESULTS)"
	$(BIN)/fastcm bench kernels --quick --json "$(RESULTS)/kernels.json"
	$(BIN)/fastcm bench latency --quick --json "$(RESULTS)/latency.json"
	$(BIN)/fastcm bench train --quick --json "$(RESULTS)/train.json"
	$(BIN)/python -m fastcm.benchmarks.latency.networks --quick --json "$(RESULTS)/networks.json"

# Every training method on both sets of digits, three seeds each; goes on where it stopped.
methods: $(VENV)/installed
	mkdir -p "$(RESULTS)"
	$(BIN)/python -m fastcm.benchmarks.quality.methods --json "$(RESULTS)/methods.json"
	$(BIN)/python -m fastcm.benchmarks.quality.methods --json "$(RESULTS)/methods.json" --preset mnist --teacher-kimg 100

# The pictures of docs/generation.md, by the shipped model; then those of the pages that it draws on, which need Chromium.
gallery: $(VENV)/installed
	$(BIN)/python -m fastcm.benchmarks.quality.gallery
	$(BIN)/python -m fastcm.benchmarks.quality.screenshots

# Injects the 25 faults with full counts and writes docs/reliability.md; goes on where it stopped (at one commit).
faults: $(VENV)/installed
	$(BIN)/python -m fastcm.benchmarks.reliability.faults --out docs/reliability.md

# Half an hour of training, sampling, exporting and serving from many threads, with flat memory.
soak: $(VENV)/installed
	$(BIN)/python -m fastcm.benchmarks.reliability.soak --minutes 30

# The installed layout as links, so that a Python in which nothing may be installed still finds fastcm.kernels.
# PYTHONSAFEPATH keeps the checkout's own fastcm/, which lacks it, off the path; child processes inherit both.
LAYOUT := build/layout
GPU = PYTHONPATH="$(CURDIR)/$(LAYOUT)$${PYTHONPATH:+:$$PYTHONPATH}" PYTHONSAFEPATH=1 $(PYTHON)

gpu:
	@case "$(STAGE)" in all|test|kernels|latency|train) ;; *) echo "make: unknown STAGE: $(STAGE). Choose all, test, kernels, latency or train." >&2; exit 2;; esac
	rm -rf $(LAYOUT) && mkdir -p $(LAYOUT)/fastcm "$(RESULTS)"
	ln -s "$(CURDIR)"/fastcm/*.py "$(CURDIR)"/fastcm/*/ "$(CURDIR)"/kernels "$(CURDIR)"/export "$(CURDIR)"/benchmarks $(LAYOUT)/fastcm/
ifeq ($(STAGE),all)
	$(GPU) -m fastcm.benchmarks.first_hour.stages --out "$(RESULTS)/$(if $(findstring --dry,$(ARGS)),rehearsal,gpu)" $(ARGS)
else ifeq ($(STAGE),test)
	$(GPU) -m pytest -m gpu -p no:cacheprovider $(ARGS)
else
	$(GPU) -m fastcm bench $(STAGE) --json "$(RESULTS)/$(STAGE).json" $(ARGS)
endif
