# make run | test | check | bench. Everything is installed from this project's own files into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: run test test-gpu check bench bench-gpu bench-gpus2 install sandbox clean

run: install sandbox
	$(BIN)/python -m pipeline run +stage=all

test: install sandbox
	$(BIN)/python -m pytest -q

# On a GPU machine, with the Python that has its torch: make test-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python

# What needs two GPUs is skipped on one.
test-gpu:
	$(GPU_PYTHON) -m pytest -q -m "gpu or gpus2" tests

bench-gpu:
	for each in "gpu_attention --long" gpu_ops "gpu_layer --peer" gpu_decode grpo_gpu; do \
	  set -- $$each; PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) benchmarks/bench_$$1.py $$2 || exit; \
	done

bench-gpus2:
	PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) benchmarks/bench_zero_gpu.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: install
	$(BIN)/python -m pip install -q -e ".[bench]"
	$(BIN)/python benchmarks/bench_grpo_cpu.py

install: $(VENV)/installed

# torch first, pinned: unpinned it brings gigabytes of CUDA. DeepSpeed's source build looks for the torch that is installed.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0 "setuptools>=77" wheel numpy
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-build-isolation deepspeed==0.19.8
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

# Model-written code runs in bubblewrap; without it the code and agent domains refuse to start and say so.
sandbox:
	@command -v bwrap >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq bubblewrap; \
	elif sudo -n true 2>/dev/null && command -v apt-get >/dev/null; then sudo -n apt-get update -qq && sudo -n apt-get install -y -qq bubblewrap; \
	else echo "bubblewrap is missing; install it with: sudo apt-get install bubblewrap"; fi

clean:
	rm -rf $(VENV) outputs
