# Two commands for a fresh machine with Python 3.11 or newer, git and make: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/quick
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS ?= ignore

help:  ## what each target does
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | column -t -s '|'

install: $(VENV)/.installed  ## virtual environment with the pinned packages (the other targets do this by themselves)

$(VENV)/.installed: constraints.txt settings.ini setup.py pyproject.toml
	@echo "== installing into $(VENV): once, a few minutes"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kalm needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r constraints.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: install  ## the quick preset on CLEVR-Robot from data to figures, ten minutes on two recent cores; continues where it stopped
	@echo "== kalm run --preset quick --out $(OUT)"
	@$(BIN)/kalm run --preset quick --out $(OUT)

test: install  ## lint, layers, package in step with notebooks, pytest, every notebook top to bottom
	@echo "== lint and layers"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/lint-imports --no-cache >/tmp/kalm-layers.$$$$ 2>&1 || (cat /tmp/kalm-layers.$$$$; exit 1)
	@echo "== pytest"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope tests
	@echo "== notebooks"
	@OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/nbdev_test --n_workers 2 --timing

export: install  ## write kalm/*.py and README.md from the notebooks
	@$(BIN)/python tools/export.py && $(BIN)/nbdev_clean
	@$(BIN)/python tools/readme.py

results: install  ## keep the numbers of a finished run, OUT=runs/quick or runs/best, for README and notebooks
	@$(BIN)/python tools/publish.py $(OUT)

docs: install  ## a site to browse from notebooks and docstrings, in _site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "look at it: $(PYTHON) -m http.server --directory _site"

lab: install  ## open the notebooks
	@$(BIN)/jupyter lab nbs

clean:  ## remove the virtual environment and caches of this folder (runs are kept)
	rm -rf $(VENV) .pytest_cache .ruff_cache build _site *.egg-info

.PHONY: help install run test export results docs lab clean
