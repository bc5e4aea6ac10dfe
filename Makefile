# Everything runs in .venv, which the first target that needs it creates. Choose another interpreter with PYTHON=python3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
OUTPUT ?= demo-run

.PHONY: help demo test test-browser test-trainers lint format docs site architectures bench clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

demo: $(VENV)/.installed ## Run the whole method on this machine (a few minutes)
	$(BIN)/emloc-tools demo --overwrite --output $(OUTPUT)

test: $(VENV)/.developer lint ## Check everything that CI checks
	$(BIN)/python -m tests.external.environments
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs --numprocesses 2

# A browser comes with the operating system. On Debian: apt-get install chromium-headless-shell
test-browser: $(VENV)/.developer ## Check the report in a headless Chromium (EMLOC_BROWSER, or one on the path), which make test does where one is
	EMLOC_BROWSER_TESTS=required OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/reporting/test_browser.py

test-trainers: $(VENV)/.developer ## Train by every trainer, and write docs/trainers.md's table and the pages in docs/trainers (some minutes)
	$(BIN)/python -m tests.external.environments
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.external.trainers_table $(ENVIRONMENTS)

lint: $(VENV)/.developer ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.developer ## Put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.developer ## Write what is generated: command reference, recorded results, schemas
	$(BIN)/python -m docs.generate
	$(BIN)/python -m formats.make_schemas
	$(BIN)/python -m formats.make_json_schemas
	$(BIN)/python -m formats.make_plan_golden

site: $(VENV)/.site-builder ## Build the documentation as a site, into site/, with every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

architectures: $(VENV)/.developer ## Measure again what docs/architectures.md says of every family of models (two minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures.table

bench: $(VENV)/.developer ## Measure again what docs/benchmarks.md shows (about an hour)
	$(BIN)/python -m benchmarks.demo
	$(BIN)/python -m benchmarks.streaming
	$(BIN)/python -m benchmarks.decomposition
	$(BIN)/python -m benchmarks.backward
	$(BIN)/python -m benchmarks.billion
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.diffusion
	$(BIN)/python -m benchmarks.quantised
	$(BIN)/python -m benchmarks.transfer.heads

clean: ## Remove the environments, caches and the demo's files
	rm -rf $(VENV) site .venv-trainer-* .mypy_cache .ruff_cache .pytest_cache .hypothesis $(OUTPUT)

# torch first and by itself: with its version spelled out, pip takes a CPU build where one is offered locally.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, found " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.developer: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.site-builder: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@
