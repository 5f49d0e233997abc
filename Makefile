# `make figures` and `make test` do everything on a machine with Python 3.11 to 3.13, git, make and a package index.
PYTHON ?= python3
SUITE ?= offline
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: help venv figures test smoke lab book colab publish clean

help:
	@echo "make figures   run every notebook at the offline scale (SUITE=$(SUITE)) into papermill_runs/$(SUITE)/"
	@echo "make test      lint and test"
	@echo "make smoke     run every notebook on the tiny model, in minutes"
	@echo "make lab       open the notebooks in JupyterLab"
	@echo "make book      a static HTML book with search of the executed notebooks, in papermill_runs/book/$(SUITE)/"
	@echo "make colab     run the smoke suite beside Colab's versions, in an environment of its own"
	@echo "make publish   copy the executed notebooks of $(SUITE), figures and data to papermill_runs/published/"
	@echo "make venv      only the environment ($(VENV))"
	@echo "make clean     remove the environment and what suites made here; downloads and runs stay in the cache (reconkit data)"
	@echo "Settings: PYTHON=python3.12  SUITE=offline-full  TORCH_INDEX=<index that has torch>"

venv: $(READY)

# The stamp comes last, so that an install that failed is tried again.
$(READY): pyproject.toml constraints.txt .ci/torch
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
		{ echo "reconkit needs Python 3.11 to 3.13, but '$(PYTHON) -V' says '$$($(PYTHON) -V 2>&1 | tail -n 1)'; name another with make PYTHON=python3.12." >&2; exit 1; }
	@[ "$$($(BIN)/python -V 2>&1)" = "$$($(PYTHON) -V)" ] || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV) (once, a few minutes) ..."
	@$(BIN)/python -m pip install -q --upgrade pip
	@.ci/torch $(BIN)/python "$(TORCH_INDEX)"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[all]'
	@touch $@

figures: $(READY)
	@$(BIN)/reconkit suite run papermill_runs/$(SUITE).toml

smoke: $(READY)
	@$(BIN)/reconkit suite run papermill_runs/smoke.toml

test: $(READY)
	@$(BIN)/ruff check -q
	@$(BIN)/python -m pytest -q

lab: $(READY)
	@$(BIN)/jupyter lab notebooks

colab:
	@.ci/colab $(PYTHON) "$(TORCH_INDEX)"

book: $(READY)
	@$(BIN)/reconkit suite book papermill_runs/$(SUITE).toml

publish: $(READY)
	@$(BIN)/reconkit suite publish papermill_runs/$(SUITE).toml

clean:
	@rm -rf $(VENV) .pytest_cache .ruff_cache build dist
	@find papermill_runs -mindepth 1 -maxdepth 1 -type d ! -name published ! -name records -exec rm -rf {} +
	@find reconkit tests -name __pycache__ -type d -prune -exec rm -rf {} +
