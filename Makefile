# CONTRIBUTING.md describes the targets.
#   make pretrain [BACKEND=torch|jax] [OUT=runs/digits]
# Everything is installed into .venv, at the versions in constraints.txt; test-lowest has .venv-lowest,
# test-foreign .venv-foreign. PIP_ARGS passes options on to pip.

PYTHON ?= python3
BACKEND ?= torch
OUT ?= runs/digits
PIP_ARGS ?=
ALL := torch,jax,train,evaluate,hf,tensorboard,parquet,lmdb,remote,medical,video,testing,test,remote-tests
BIN := .venv/bin

.PHONY: pretrain test test-lowest test-foreign lint docs bench bench-full gpu verdicts sizes release-check clean

pretrain: .venv/installed-$(BACKEND)
	$(BIN)/prmim pretrain --backend $(BACKEND) --out $(OUT) --resume

# One thread each: two test processes that each use all cores wait for one another most of the time. XLA compiles a
# training step in a third of the time without its newer code generator, and in less again if it does not split the code
# between threads. The runs that fault tests start compile as usual.
TEST_XLA_FLAGS := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
TEST_SETTINGS := OMP_NUM_THREADS=1 XLA_FLAGS="$(TEST_XLA_FLAGS)"
test: .venv/installed-dev
	$(TEST_SETTINGS) $(BIN)/python -m pytest -q -n 2 --dist worksteal

# Old versions warn about themselves: warnings are no errors here.
LOWEST := .venv-lowest
test-lowest: $(LOWEST)/installed
	rm -rf $(LOWEST)/runs
	for backend in torch jax; do \
		$(LOWEST)/bin/prmim pretrain --backend $$backend --epochs 2 --out $(LOWEST)/runs/$$backend || exit 1; \
	done
	$(TEST_SETTINGS) $(LOWEST)/bin/python -m pytest -q -n 2 --dist worksteal -o filterwarnings= tests/core/test_backends.py \
		$(foreach backend,torch jax,$(foreach topic,engine teacher plan,tests/$(backend)/test_$(topic).py)) \
		tests/parity/test_numbers.py tests/train/test_pretrain_torch.py \
		tests/train/test_pretrain_jax.py tests/train/data/test_sources.py tests/train/run/test_trackers.py

# Keras runs on each of its backends that is installed: TensorFlow here.
FOREIGN := .venv-foreign
test-foreign: $(FOREIGN)/installed
	$(FOREIGN)/bin/python -m pytest -q -rs tests/foreign

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: .venv/installed-dev
	$(BIN)/python -m benchmarks
bench-full: .venv/installed-dev
	$(BIN)/python -m benchmarks --full

# What is left continues in the next call. GPU_ARGS passes options on.
GPU_ARGS ?=
gpu: .venv/installed-gpu-tests
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

verdicts: .venv/installed-dev
	$(BIN)/python -m benchmarks.quality.verdicts

# MB in an environment of its own, without pip; torch is listed by itself.
SIZES := core torch jax train evaluate hf parquet lmdb remote medical video testing tensorboard wandb mlflow gpu-tests
sizes:
	@for extra in $(SIZES); do \
		$(PYTHON) -m venv --clear .venv-size; \
		.venv-size/bin/python -m pip install -q $(PIP_ARGS) -c constraints.txt ".$$(test $$extra = core || echo "[$$extra]")" || exit 1; \
		.venv-size/bin/python -m pip uninstall -q -y pip setuptools; \
		size=$$(du -sm .venv-size | cut -f1); torch=$$(du -sm .venv-size/lib/python*/site-packages/torch 2>/dev/null | cut -f1); \
		echo "$$extra $$((size - $${torch:-0})) torch $${torch:-0}"; \
	done; rm -rf .venv-size

# The source distribution and the wheel built from it, on every one of these versions that is installed.
PYTHONS ?= python3.11 python3.12 python3.13
release-check: .venv/installed-dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	@for python in $(PYTHONS); do \
		for file in dist/*; do .ci/try-distribution $$python $$file || exit 1; done; \
	done

clean:
	rm -rf .venv .venv-lowest .venv-foreign .venv-size build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

# Libraries that tests exchange weights with, without what they depend on: timm's models do not need torchvision.
HOSTS := timm

# A stamp for every set of extras; a change of the pins or of the project file installs again.
.venv/installed-torch: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[torch,train,evaluate]'
	@touch $@

.venv/installed-jax: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[jax,train,evaluate]'
	@touch $@

.venv/installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[$(ALL),docs,dev]'
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt --no-deps $(HOSTS)
	@touch $@

# Triton is large; its tests are skipped without it.
.venv/installed-gpu-tests: .venv/installed-dev
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[gpu-tests]'
	@touch $@

$(LOWEST)/installed: pyproject.toml tests/lowest.py
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/pins.txt
	$(LOWEST)/bin/python -m pip install -q $(PIP_ARGS) -c $(LOWEST)/pins.txt -e '.[$(ALL)]'
	@touch $@

$(FOREIGN)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(FOREIGN)
	$(FOREIGN)/bin/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[foreign-tests,evaluate,testing,test]'
	@touch $@
