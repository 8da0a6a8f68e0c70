# make demo | build | test | lint | bench | clean, on a machine that has Python 3.10 or newer and a
# C++ compiler. Everything else goes into .venv, once; a later run installs only what changed.
# MSDKERN_CUDA=on adds the CUDA kernels (needs nvcc). PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
MSDKERN_CUDA ?= off
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(sort $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu'))
PACKAGE := $(VENV)/.package-cuda-$(MSDKERN_CUDA)
PIP := $(BIN)/python -m pip --disable-pip-version-check
SAY = @printf '\n==> %s\n'

export MSDKERN_CUDA

.PHONY: help demo build test lint bench clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,3s/^# //p' Makefile

demo: $(PACKAGE)
	$(SAY) 'What this computer offers'
	@$(BIN)/msdkern doctor
	$(SAY) 'Training a multi-exit network on 1,797 handwritten digits (a new folder under runs/)'
	@$(BIN)/msdkern train

# As many processes as cores, at most four: threads that wait must leave the cores to the others.
test: export OMP_WAIT_POLICY = passive
test: $(PACKAGE)
	$(SAY) 'Testing'
	@$(BIN)/python -m pytest tests -n logical --maxprocesses 4 --dist loadscope

build: $(PACKAGE)

lint: $(VENV)/.requirements
	$(SAY) 'Checking style and types'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(NATIVE)

bench: $(PACKAGE)
	$(SAY) 'Timing against plain and compiled PyTorch'
	@$(BIN)/msdkern bench

clean:
	rm -rf build dist *.egg-info msdkern/_build.json msdkern/*.so $(VENV)/.package-*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/.created:
	$(SAY) 'Creating $(VENV)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'make: Python 3.10 or newer is needed; choose one by PYTHON=...' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo 'make: no venv module (Debian, Ubuntu: python3-venv)' >&2; exit 1; }
	@touch $@

$(VENV)/.requirements: requirements-dev.txt requirements-trainers.txt $(VENV)/.created
	$(SAY) 'Installing the pinned requirements (PyTorch is large: minutes, once)'
	@$(PIP) install -r requirements-dev.txt
	@$(PIP) install --no-deps -r requirements-trainers.txt
	@touch $@

$(PACKAGE): $(NATIVE) CMakeLists.txt setup.py pyproject.toml $(VENV)/.requirements
	$(SAY) 'Building and installing msdkern (CUDA kernels: $(MSDKERN_CUDA))'
	@$(PIP) install -q --no-build-isolation --no-deps -e .
	@rm -f $(VENV)/.package-*
	@touch $@
