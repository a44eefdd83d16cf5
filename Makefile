# `make demo` and `make test` do everything on a fresh machine: an environment in .venv, then the work itself.
# Another interpreter: make test PYTHON=/path/to/python3.12

# pyenv's shims exist for versions that do not run, so each candidate is tried, not only looked up.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3.13 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $$python && break; done)
VENV := .venv/bin
PACKAGES := core kernels training pipelines nodes cli
export HF_HUB_OFFLINE = 1

.PHONY: help demo test test-all test-kernels lint types unit format clean

help:
	@echo "make demo    distil the bundled tiny model to one step and show it beside its teacher"
	@echo "make test    style, types and the tests, in two processes (JOBS=4 for four)"
	@echo "make test-all   the same with the broadest matrices, which take long and seldom find anything"
	@echo "make test-kernels   the kernels' tests with Triton, which is installed for them (a gigabyte)"
	@echo "make format  let ruff rewrite the sources"
	@echo "make clean   remove what make made, the runs excepted"

demo: .venv/.ready
	$(VENV)/onestep demo

# mypy has one core to itself for a minute, so the tests begin beside it.
test: lint
	@$(MAKE) --no-print-directory -j 2 types unit CHOSEN='$(CHOSEN)'

test-all: CHOSEN =
test-all: test

lint: .venv/.ready
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

# mypy wants a folder named as the package; a link to here is one.
types: .venv/.ready .pkg/onestep
	MYPYPATH=.pkg $(VENV)/mypy $(PACKAGES:%=-p onestep.%)

# A file's tests stay in one process, with what they have made, and those of ComfyUI in one (tests/conftest.py). Tiny tensors gain nothing
# from threads, and a machine may have fewer cores to give than it has.
JOBS ?= 2
CHOSEN = -m "not broad"
unit: export OMP_NUM_THREADS ?= 1
unit: .venv/.ready
	$(VENV)/python -m pytest -n $(JOBS) --dist loadfile $(CHOSEN) $(PYTEST_ARGS)

# --no-deps: a Triton beside a torch that asks for none.
test-kernels: .venv/.ready
	$(VENV)/python -m pip install --quiet --no-deps 'triton>=3.6'
	$(VENV)/python -m pytest tests/kernels $(PYTEST_ARGS)

format: .venv/.ready
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

# constraints.txt holds torch: without it a dependency may pull another build, gigabytes of CUDA with it.
.venv/.ready: pyproject.toml setup.py requirements.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "OneStep needs Python 3.10 or newer, and none was found: install one, or name it with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.pkg/onestep:
	@mkdir -p .pkg
	@ln -sfn .. $@

clean:
	rm -rf .venv .pkg build *.egg-info .pytest_cache .mypy_cache .ruff_cache
