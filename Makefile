# Targets for people and for CI; `make` alone lists them.

VENV   ?= .venv
# The first Python here that is new enough.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
  $$name -c '$(SUPPORTED)' 2>/dev/null && { echo $$name; break; }; done)
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
RECIPE ?=
ARGS   ?=
OUT    ?=
JOBS   ?= 2

BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# One thread for each of the parallel test processes: more would only fight for the cores.
SINGLE := OMP_NUM_THREADS=1

# Libraries of public models need a torch that torchvision was built for, so they have an environment of their own.
ZOO       ?= .venv-zoo
ZOO_READY := $(ZOO)/.ready
ZOO_PINS  := torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check sweep compress zoo clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## Make the virtual environment .venv and install into it.

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' || \
	  { echo "no Python 3.11, 3.12 or 3.13 found; name one: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,joblib]'
	@touch $@

demo: $(READY)  ## Run the quickstart: train, prune, distil, quantize, prove.
	$(BIN)/mil compress recipes/quickstart.yaml

test: $(READY)  ## Run the tests but the slow ones.
	$(SINGLE) $(BIN)/python -m pytest -q -m 'not slow' -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(READY)  ## Run the slow tests: whole recipes, kills, an installed wheel.
	$(SINGLE) $(BIN)/python -m pytest -q -m slow

check: $(READY)  ## Run the linters, the type checker and the import contracts.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

sweep: $(READY)  ## Run a sweep: make sweep [RECIPE=FILE] [ARGS="key=1,2"] [OUT=DIR].
	$(BIN)/mil compress $(or $(RECIPE),recipes/fashion_mnist/sweep_last_stage.yaml) -m $(ARGS) $(if $(OUT),--out $(OUT))

compress: $(READY)  ## Run a recipe: make compress RECIPE=FILE [ARGS="key=value"] [OUT=DIR].
	@test -n "$(RECIPE)" || { echo 'name a recipe: make compress RECIPE=recipes/quickstart.yaml' >&2; exit 2; }
	$(BIN)/mil compress $(RECIPE) $(ARGS) $(if $(OUT),--out $(OUT))

$(ZOO_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ZOO)
	grep -vi '^torch==' constraints.txt > $(ZOO)/constraints.txt
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c $(ZOO)/constraints.txt $(ZOO_PINS) -e .
	@touch $@

zoo: $(ZOO_READY)  ## Cut and prove public models, or quantize some: make zoo [ARGS="--int8 --only *swin* --again"].
	$(SINGLE) $(ZOO)/bin/python -m scripts.zoo $(ARGS)

clean:  ## Remove the environments, builds and tool caches; runs/ and the stage cache stay.
	rm -rf $(VENV) $(ZOO) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -exec rm -rf {} +
