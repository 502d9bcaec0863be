# `make demo` and `make test` set up all they need; a second run reinstalls nothing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
BASE := $(VENV)/base
STAMP := $(VENV)/installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-browser fuzz bench docs style quality

$(BASE): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) --editable .
	touch $@

$(STAMP): $(BASE)
	$(INSTALL) --editable ".[dev]"
	touch $@

demo: $(BASE)  ## Generates outputs/demo.png with the bundled model.
	$(BIN)/python examples/generate.py --output outputs/demo.png

test: $(STAMP)  ## Runs the whole suite but the browser's.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --ignore tests/browser

test-browser: $(STAMP)  ## Tests the Space's page in Debian's Chromium, which it installs if there is none.
	command -v chromium > /dev/null || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -qq -y chromium fonts-dejavu-core > /dev/null; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

fuzz: $(STAMP)  ## Damages files of every kind for half an hour and reads them; FUZZ_EXAMPLES=N sets how many.
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),2000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 0 --numprocesses 2 tests/fuzz

bench: $(STAMP)  ## Measures the tables of benchmarks/README.md, in some four hours; quality needs outputs/emoji64.
	$(BIN)/python benchmarks/bench.py --output outputs/bench.json

docs: $(STAMP)  ## Builds the site into site/, without a warning; open site/index.html.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

style: $(STAMP)  ## Formats, and fixes what ruff can fix.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: $(STAMP)  ## Checks format, lint, spelling and the types of the public API.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
