# make reproduce   install, compute the DyPrune tables and figures on real data into out/, print the verdicts beside the
#                  committed ones, and judge all that is committed again; writes nothing that git knows
# make test        install, run the tests            make notebooks   run every notebook at preset smoke
# make lab         install, open JupyterLab          make browser     drive JupyterLab in headless Chromium
# make cluster     studies on a Dask cluster here     make lint        format, style, imports, notebooks
# make clean       remove what make and Python left, but not runs/
#
# A second make installs nothing, so it needs no network. Variables: PYTHON=python3.12 VENV=.venv PAPER=dropnet
# PRESET=smoke|quick|paper JOBS=processes that train; one per core without it TESTERS=test processes.

PYTHON ?= python3
VENV ?= .venv
PAPER ?= dyprune
PRESET ?= quick
TESTERS ?= 2

BIN := $(VENV)/bin
# The stamp is the pyproject.toml that was installed: only a change of its content installs again. The package itself is
# installed editable, so a change of the source needs nothing.
STAMP := $(VENV)/installed.toml
PYTEST := $(BIN)/python -m pytest
NOTEBOOKS = $(shell find notebooks -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*')

# A Python that is asked for and is not the one in the environment would be passed over in silence.
VERSION = import sys; print(*sys.version_info[:2], sep=".")
ifneq ($(origin PYTHON),file)
ifneq ($(and $(wildcard $(BIN)/python),$(if $(filter clean,$(MAKECMDGOALS)),,checked)),)
ifneq ($(shell $(PYTHON) -c '$(VERSION)'),$(shell $(BIN)/python -c '$(VERSION)'))
$(error $(VENV) was made with another Python than $(PYTHON); make clean first, or add VENV=.venv2)
endif
endif
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: reproduce test notebooks browser cluster lint lab install clean
.DEFAULT_GOAL := reproduce

reproduce: $(STAMP)
	@$(BIN)/prunelab reproduce --paper $(PAPER) --preset $(PRESET) $(if $(JOBS),--jobs $(JOBS))
	@$(BIN)/prunelab verify

test: $(STAMP)
	@$(PYTEST) -q -n $(TESTERS) --dist worksteal

# Notebooks that no test names yet are no failure (5: nothing was selected).
notebooks: $(STAMP)
	@$(PYTEST) -q -m notebook -n $(TESTERS) --dist worksteal || [ $$? -eq 5 ]

browser: $(STAMP)
	@$(PYTEST) -q -m browser || [ $$? -eq 5 ]

# Studies on a Dask cluster that is started on this machine.
cluster: $(STAMP)
	@$(PYTEST) -q -m cluster

lint: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(if $(NOTEBOOKS),$(BIN)/nbstripout --verify --keep-id --extra-keys "metadata.papermill metadata.widgets \
		cell.metadata.papermill cell.metadata.execution metadata.language_info.version" $(NOTEBOOKS))

lab: $(STAMP)
	@$(BIN)/jupyter lab $(firstword $(wildcard notebooks/index.ipynb notebooks/start_here.ipynb) notebooks)

install: $(STAMP)

$(STAMP): pyproject.toml
	@if cmp -s pyproject.toml $@; then touch $@; else $(MAKE) --no-print-directory _install; fi

.PHONY: _install
_install:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] < (3, 14) else \
		"prunelab needs Python 3.10 to 3.13, this is %s; try make PYTHON=python3.12" % sys.version.split()[0])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV); the first time this fetches some gigabytes (torch) and takes minutes"
	@$(BIN)/python -m pip install -q -e '.[all]'
	@cp pyproject.toml $(STAMP)

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis figures/smoke out/smoke
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
