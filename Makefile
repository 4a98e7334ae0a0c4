# From a bare Debian or Ubuntu machine with Python and a C++ compiler, each of these does everything:
#   make demo        trains two small models on spiral
#   make test        lint, types and the everyday tier of tests
#   make test-full   every test, upstream's whole op tables on each engine and one engine against the other, and docs/coverage.md
#                    from them; resumable, hours on a CPU.
#                    SHARD=0/4 runs the first of four parts, SAMPLES=2 at most two samples a check
#   make bench       the benchmarks
#   make docs        the generated pages under docs/
# PYTHON picks the interpreter. TORCH_INDEX=<url> takes torch from another package index, such as that of its CPU builds.
# Device: SPIRAL_ENGINE=opencl|wgpu|cuda. Arguments for pytest: ARGS="-k softmax".

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
TORCH_INDEX ?=
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
ARGS ?=
SHARD ?= 0/1
SAMPLES ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
TORCH_PIP := $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.py' -o -name '*.yaml')

.PHONY: setup engines demo lint test test-full bench docs clean
.DEFAULT_GOAL := demo

# Each stamp says that a step was done for the present version of the files it depends on.

$(VENV)/.torch:
	@echo "== virtual environment with $(TORCH)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(TORCH_PIP) "$(TORCH)"
	$(PIP) numpy "wgpu>=0.32" pyopencl ninja pyyaml "setuptools>=77" wheel
	@touch $@

$(VENV)/.package: $(VENV)/.torch setup.py pyproject.toml $(CPP)
	@echo "== building torch_spiral: minutes the first time, then only what changed"
	MAX_JOBS=$(JOBS) $(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch requirements-dev.txt
	@echo "== test requirements"
	$(PIP) -r requirements-dev.txt
	$(TORCH_PIP) --no-deps "$(TORCHVISION)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch
	$(PIP) scikit-learn matplotlib
	@touch $@

setup: $(VENV)/.package engines

engines:
	@scripts/install_engines.sh

demo: setup $(VENV)/.demo
	$(BIN)/python examples/demo.py

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy

# A lint error must not hide the tests' result, nor the tests' result the lint error.
test: setup $(VENV)/.dev
	@status=0; $(MAKE) --no-print-directory lint || status=1; \
	$(BIN)/python -m pytest -n $(JOBS) -m "not full" --timeout 600 $(ARGS) || status=1; exit $$status

test-full: setup $(VENV)/.dev
	@status=0; $(MAKE) --no-print-directory lint || status=1; \
	$(BIN)/python -m pytest -n $(JOBS) --timeout 3600 --shard $(SHARD) $(ARGS) || status=1; \
	engines=$$($(BIN)/python -m torch_spiral.testing engines); \
	for engine in $$engines; do \
	  $(BIN)/python -m torch_spiral.testing coverage --engine $$engine --all --kinds op,ref,module,optim --resume \
	    --workers $(JOBS) --shard $(SHARD) $(if $(SAMPLES),--samples $(SAMPLES)) || status=1; \
	done; \
	[ $$(echo $$engines | wc -w) -lt 2 ] || $(BIN)/python -m torch_spiral.testing differential --workers $(JOBS) --shard $(SHARD) \
	  $(if $(SAMPLES),--samples $(SAMPLES)) || status=1; \
	$(BIN)/python -m torch_spiral.testing coverage --report || status=1; exit $$status

bench: setup $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

docs: setup $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m docs.generate $(ARGS)

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis torch_spiral/*.so
