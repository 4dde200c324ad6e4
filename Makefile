# Every target sets up .venv by itself on first use, and again when the lock or pyproject.toml
# changed. With a complete .venv nothing is fetched.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3.11 python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --quiet
# make bench BENCH_DIR=reports/full/02_speed/benchmarks publishes what was measured.
BENCH_DIR ?= runs/bench
# Started by hand: time_to_accuracy.py trains for hours without a GPU, commands.py runs the quick
# study and the tests anew and replaces reports/quick.
BY_HAND := %/timing.py %/time_to_accuracy.py %/commands.py
BENCHMARKS := $(filter-out $(BY_HAND),$(wildcard benchmarks/*.py))
INSTALLED := $(VENV)/.installed
# Tests ask no network. As many files of them run at a time as WORKERS says, each on one thread: so
# they do not fight for the cores.
OFFLINE := CIFAR10_DOWNLOAD=0 OMP_NUM_THREADS=1
WORKERS ?= 2
PYTEST := $(OFFLINE) $(BIN)/pytest --numprocesses=$(WORKERS) --dist=loadfile

.DEFAULT_GOAL := help
.PHONY: help study test test-long full lab report bench refresh lock clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r name what; \
		do printf 'make %-10s %s\n' "$$name" "$$what"; done

study: $(INSTALLED) ## the main job: the four stages and the comparison, preset quick, to reports/quick
	@$(BIN)/python -m cifar_lib study --preset quick

test: $(INSTALLED) ## lint, types, tests and the notebooks' compared outputs
	@echo "== ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== pip check"
	@$(PIP) check
	@echo "== pytest"
	@$(PYTEST) tests
	@if compgen -G 'notebooks/*.ipynb' >/dev/null; then \
		echo "== nbval"; \
		$(PYTEST) --nbval --nbval-current-env --nbval-cell-timeout=300 --timeout=0 notebooks; \
	else \
		echo "== nbval: skipped, notebooks/ has no notebook"; \
	fi

test-long: $(INSTALLED) ## all tests, those that take minutes too
	@$(OFFLINE) $(BIN)/pytest -m "long or not long" --timeout=1800 tests

full: $(INSTALLED) ## as study, with the preset full: says first how many hours
	@$(BIN)/python -m cifar_lib study --preset full

lab: $(INSTALLED) ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab notebooks

report: $(INSTALLED) ## regenerate the index and the tables from the summaries
	@$(BIN)/python -m cifar_lib report

bench: $(INSTALLED) ## time what benchmarks/ compares, one script after another (leave the machine alone)
	@mkdir -p $(BENCH_DIR)
	@for script in $(BENCHMARKS); do echo "== $$script"; \
		$(BIN)/python "$$script" --out "$(BENCH_DIR)/$$(basename "$$script" .py).json"; done

refresh: $(INSTALLED) ## execute the notebooks in place (smoke setting): their compared outputs anew
	@rm -rf runs/smoke runs/*-smoke runs/*-smoke-search # so that training shows its lines
	@$(OFFLINE) $(BIN)/jupyter nbconvert --log-level=WARN --to notebook --inplace --execute \
		--KernelManager.transport_encryption=auto --ExecutePreprocessor.kernel_name=python3 \
		--ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	@$(BIN)/nbstripout --keep-output --keep-count --keep-id --extra-keys \
		"metadata.language_info metadata.papermill cell.metadata.papermill" notebooks/*.ipynb

clean: ## remove caches and built pages; keeps .venv, data/ and runs/
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name $(notdir $(VENV)) -prune -o \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

# The stamp is written last, and pip writes a package's INSTALLER last: so an interrupted install is
# taken up again, not taken for a whole one. setuptools comes with the lock, so the package itself
# needs no build environment from the network.
IS_RECENT := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
# An environment that was moved here, or whose Python is gone, runs no more: it is made anew.
IS_HERE := { ! grep -qs '^command = ' $(VENV)/pyvenv.cfg || \
	grep -qF -- ' $(abspath $(VENV))' $(VENV)/pyvenv.cfg; } && $(BIN)/python $(IS_RECENT)
ifneq ($(shell test ! -e $(INSTALLED) || { $(IS_HERE); } || echo gone),)
.PHONY: $(INSTALLED)
endif
$(INSTALLED): requirements.lock pyproject.toml
	@rm -f $@
	@if ! { $(IS_HERE); } || ! $(PIP) --version >/dev/null 2>&1; then \
		for python in $(PYTHON) ''; do "$$python" $(IS_RECENT) && break; done; \
		if [ -z "$$python" ]; then \
			echo "make: Python 3.11 or newer is needed, not found as: $(PYTHON);" \
				"name one with make PYTHON=/path/to/python3" >&2; exit 1; \
		fi; \
		echo "== making $(VENV) with $$python"; \
		"$$python" -m venv --clear $(VENV); \
	fi
	@echo "== installing requirements.lock into $(VENV) (once; up to 6.5 GB, some minutes)"
	@find $(VENV) -name '*.dist-info' ! -exec test -e {}/INSTALLER \; -prune -exec rm -r {} +
	@$(INSTALL) --requirement requirements.lock
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@$(PIP) check
	@$(BIN)/python -m cifar_lib.launch
	@touch $@

# To take newer versions: .venv/bin/pip install --upgrade NAME, make lock, make test.
# Notes and the pins of aarch64 are carried over.
X86_LINUX := sys_platform == "linux" and platform_machine == "x86_64"
NOT_ARM_LINUX := sys_platform != "linux" or platform_machine != "aarch64"
lock: $(INSTALLED) ## rewrite requirements.lock from what is installed (on Linux x86_64)
	@{ sed -n '/^#/p' requirements.lock; { \
		grep ' == "aarch64"' requirements.lock; \
		$(PIP) freeze --all --exclude pip --exclude-editable | sed -E \
			-e 's/^(cuda-|nvidia-|triton=).*/& ; $(X86_LINUX)/' \
			-e 's/^(torch|torchvision)=.*/& ; $(NOT_ARM_LINUX)/'; \
		} | LC_ALL=C sort --ignore-case; } >requirements.lock.new
	@mv requirements.lock.new requirements.lock
