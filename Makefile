# Everything below works from a fresh clone with Python >= 3.11 and make; targets can be repeated.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= torchzoo-quickstart
# Two processes with one thread each suit two cores; override on a larger machine.
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PROJECT := setup.cfg pyproject.toml setup.py
KERNELS := $(wildcard torchzoo/csrc/*) torchzoo/ops/building.py

.PHONY: help setup demo test test-slow lint format types imports docs notebooks wheel wheel-test clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "torchzoo needs Python >= 3.11, found $$($(PYTHON) --version); set PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-ready: $(PROJECT) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[plot]'
	@touch $@

$(VENV)/.dev-ready: $(PROJECT) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.demo-ready

# The kernels are optional: without a compiler the operators run on their PyTorch reference.
$(VENV)/.kernels: $(KERNELS) | $(BIN)/python
	@if command -v $${CXX:-g++} >/dev/null; then $(BIN)/torchzoo build; \
	  else echo "no C++ compiler: operators will run on PyTorch code"; fi
	@touch $@

setup: $(VENV)/.dev-ready $(VENV)/.kernels  ## Create .venv with everything that development needs

demo: $(VENV)/.demo-ready $(VENV)/.kernels  ## Set everything up and run the main job: torchzoo quickstart
	$(BIN)/torchzoo quickstart --out $(OUT)

test: $(VENV)/.dev-ready $(VENV)/.kernels  ## Set everything up and run the tests (PYTEST_ARGS=… for more)
	$(PYTEST) -n $(JOBS) --claims torchzoo/claims.json $(PYTEST_ARGS)

test-slow: $(VENV)/.dev-ready $(VENV)/.kernels  ## Run the tests that take minutes
	$(PYTEST) -n $(JOBS) -m slow --claims torchzoo/claims.json $(PYTEST_ARGS)

lint: $(VENV)/.dev-ready  ## Check format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev-ready  ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev-ready  ## Build the site into docs/_build, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

notebooks: $(VENV)/.dev-ready  ## Execute every notebook in place, keeping its pictures
	$(BIN)/python -m jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

wheel: $(VENV)/.dev-ready  ## Build the wheel, kernels included, into dist/
	rm -rf build/lib build/bdist* dist torchzoo/lib
	$(BIN)/torchzoo build --out torchzoo/lib $$(command -v nvcc >/dev/null && echo --cuda)
	$(BIN)/python -m build --wheel --outdir dist .
	rm -rf torchzoo/lib

wheel-test: wheel  ## Install the wheel into an empty environment and try it there
	rm -rf build/wheel-test
	$(PYTHON) -m venv build/wheel-test/venv
	build/wheel-test/venv/bin/python -m pip install --quiet dist/*.whl
	cd build/wheel-test && sh ../../tests/smoke.sh venv/bin

clean:  ## Remove what the targets made, but not the environment
	rm -rf build dist docs/_build docs/generated *.egg-info .mypy_cache .pytest_cache .ruff_cache
