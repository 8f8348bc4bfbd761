# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
# Where torch comes from. For an NVIDIA GPU: make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
STAMP := .venv/installed
TORCH := $(shell grep '^torch==' requirements.lock)

.PHONY: help setup demo test vbench lint lock clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

setup: $(STAMP)  ## virtual environment .venv with the versions of requirements.lock

# The first install may fail: without that index any build of the same version will do.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	-$(BIN)/pip install --quiet --no-deps --retries 0 --timeout 15 --index-url $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: $(STAMP)  ## HSA and its rivals on the embedded model: results/demo/index.html
	$(BIN)/hsa-bench run experiment=demo

test: $(STAMP)  ## the whole test suite, on CPU and offline
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

vbench: $(STAMP)  ## the environment of VBench's scorer; MODE=small: without models, seconds
	$(BIN)/hsa-bench setup vbench $(MODE)

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lock:  ## new requirements.lock from the newest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear build/lock
	-build/lock/bin/pip install --quiet --no-deps --index-url $(TORCH_INDEX) $(TORCH)
	build/lock/bin/pip install --quiet --upgrade-strategy eager '.[dev]'
	{ head -2 requirements.lock; build/lock/bin/pip freeze --exclude hsa-bench | sed 's/+[a-z0-9]*$$//'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock

clean:  ## remove the environment and caches; results stay
	rm -rf .venv .venv-vbench build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
