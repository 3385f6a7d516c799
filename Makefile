# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that run tests beside each other, each the tests of neighbouring files, which share fixtures
JOBS ?= 2

.PHONY: demo test test-slow quick bench check docs audit format wheel clean

demo: $(VENV)/.installed
	$(BIN)/python examples/train_qwen_edit.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow

quick: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

# Writes figures and plot into docs/performance.md
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/bench.py --write

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/find_secrets.py
	$(BIN)/python .ci/audit.py
	$(MAKE) docs

# The documentation site in site/: every link, anchor and docstring must be right
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Known vulnerabilities of the installed packages; without a network it says so and does not fail
audit: $(VENV)/.installed
	$(BIN)/python .ci/audit.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed
	$(BIN)/python -m build

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name it with PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist outputs site .pytest_cache .mypy_cache .ruff_cache
