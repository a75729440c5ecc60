# Everything runs in .venv, made on first use. `make test` is all that CI runs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SOURCES := cfld preprocessing shards train demo tests

.PHONY: setup demo lint types test test-slow format clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v < (3, 13) else "Python 3.10 to 3.12 is needed, this is %d.%d; set PYTHON=" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip wheel
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python -m demo

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(READY)
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest -m 'not slow and not gpu'

test-slow: lint types
	$(BIN)/pytest

format: $(READY)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info
