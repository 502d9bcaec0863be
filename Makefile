# `make demo` and `make test` set up all they need; a second run reinstalls nothing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test style quality

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) --editable ".[dev]"
	touch $@

demo: $(STAMP)  ## Draws outputs/demo.png with the bundled model.
	$(BIN)/python examples/generate.py --output outputs/demo.png

test: $(STAMP)  ## Runs the whole suite.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

style: $(STAMP)  ## Formats and mends what can be mended.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: $(STAMP)  ## Checks format, lint and the types of the public API.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
