# The one task list: README, CONTRIBUTING and .ci/run call these targets and nothing else.
#   make pretrain [BACKEND=torch|jax] [OUT=runs/digits]   set up, pre-train on the embedded digits, leave numbers and pictures
#   make test | lint | docs                           set up, then check
#   make bench | bench-full                           set up, then measure: in minutes, or at length
#   make verdicts                                     set up, then check the claims about accuracy against their records
# Everything is installed into .venv, at the versions in constraints.txt. PIP_ARGS passes options on to pip.

PYTHON ?= python3
BACKEND ?= torch
OUT ?= runs/digits
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: pretrain test lint docs bench bench-full verdicts wheel clean

pretrain: .venv/installed-$(BACKEND)
	$(BIN)/prmim pretrain --backend $(BACKEND) --out $(OUT) --resume

# One thread each: two test processes that each use all cores wait for one another most of the time. XLA compiles a
# training step in a third of the time without its newer code generator. The runs that fault tests start keep it.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_use_fusion_emitters=false \
		$(BIN)/python -m pytest -q -n 2 --dist worksteal

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

verdicts: .venv/installed-dev
	$(BIN)/python -m benchmarks.quality.verdicts

wheel: .venv/installed-dev
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf .venv build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

# A stamp for every set of extras; a change of the pins or of the project file installs again.
.venv/installed-torch: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[torch,train]'
	@touch $@

.venv/installed-jax: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[jax,train]'
	@touch $@

.venv/installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[torch,jax,train,docs,dev]'
	@touch $@
