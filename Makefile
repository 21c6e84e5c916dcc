# Two commands do all set-up: `make demo` runs a live mesh on this machine, `make test` runs the core tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-full lint bench clean

demo: $(VENV)/.run
	$(BIN)/pillion demo

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -m "not long"

test-full: $(VENV)/.dev lint
	$(BIN)/python -m pytest tests -m "not long"
	$(BIN)/python -m pytest tests -m long

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV) build *.egg-info

# Each mark says what the environment holds; a later one includes the earlier.
$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --group bench
	@touch $@
