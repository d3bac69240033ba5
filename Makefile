# Everything below works from a fresh clone with Python >= 3.11 and make; targets can be repeated.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= torchzoo-quickstart
# One test process a core, each with one thread.
TORCH  ?= 2.13.0
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PROJECT := setup.cfg pyproject.toml setup.py
KERNELS := $(wildcard torchzoo/csrc/*) torchzoo/ops/building.py

.PHONY: help setup demo test test-slow lint format types imports docs notebooks wheel wheel-test test-abi test-sanitize clean

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
	$(PYTEST) -n $(JOBS) --claims=torchzoo/claims.json $(PYTEST_ARGS)

test-slow: $(VENV)/.dev-ready $(VENV)/.kernels  ## Run the tests that take minutes
	$(PYTEST) -n $(JOBS) -m slow --claims=torchzoo/claims.json $(PYTEST_ARGS)

lint: $(VENV)/.dev-ready  ## Check format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev-ready  ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev-ready  ## Build the site into docs/_build, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -j $(JOBS) -b html docs docs/_build

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

test-abi: $(VENV)/.dev-ready  ## Load the CPU kernels, as built here, into another torch (TORCH=2.13.0)
	$(BIN)/torchzoo build --out build/abi
	test -x build/abi/$(TORCH)/bin/python || $(PYTHON) -m venv build/abi/$(TORCH)
	build/abi/$(TORCH)/bin/python -m pip install --quiet torch==$(TORCH) numpy einops
	for python in $(BIN)/python build/abi/$(TORCH)/bin/python; do \
	  PYTHONPATH=. $$python tests/abi.py build/abi/libtorchzoo_cpu.so || exit 1; done

# The sanitizers watch the kernels alone: torch and Python are not built with them.
test-sanitize: $(VENV)/.dev-ready  ## Run the operators' tests on kernels built with ASan and UBSan
	TORCHZOO_CACHE=build/sanitize TORCHZOO_OPS=reference $(BIN)/python -c \
	  "from torchzoo.ops import building; print(building.build('cpu', flags=['-O1', '-g', \
	  '-DTZ_ONE_ISA', '-fsanitize=address,undefined', '-fno-sanitize-recover=undefined']))"
	TORCHZOO_CACHE=build/sanitize TORCHZOO_OPS=native ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(PYTEST) tests/ops -n $(JOBS) -q --ignore tests/ops/test_library.py \
	  --ignore tests/ops/test_instruction_sets.py $(PYTEST_ARGS)

clean:  ## Remove what the targets made, but not the environment
	rm -rf build dist docs/_build docs/generated *.egg-info .mypy_cache .pytest_cache .ruff_cache
