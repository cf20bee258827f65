# Everything runs in a virtual environment inside the checkout, made on the first call. It needs Python
# (3.11 or newer) with pip, nothing else. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
# What pytest gets: make test PYTEST_ARGS="-n 8 -k ridge"
PYTEST_ARGS ?= -n 2
# make lock LOCK_ARGS=--upgrade moves every package to its newest version.
LOCK_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# pyright would otherwise ask the network whether it is the newest.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint format types imports pytest wheel lock clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

# --- the environment ----------------------------------------------------------------------------------

# Two stamps, each written last, so a half-finished environment never counts as a finished one. The first
# holds the path it was made for: scripts in the environment name it, so a moved or copied checkout makes
# its own.
DEPENDENCIES := $(VENV)/.dependencies-installed
READY := $(VENV)/.ready
ifneq ($(shell cat $(DEPENDENCIES) 2>/dev/null),$(CURDIR))
$(shell rm -f $(DEPENDENCIES) $(READY))
endif

setup: $(READY) ## make the virtual environment, or bring it up to date

$(DEPENDENCIES): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ...'; exit 1; }
	@echo 'Installing the packages of requirements.lock into $(VENV): a minute or two, once.'
	test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	rm -f $@ $(READY)
	$(PIP) install --require-hashes -r requirements.lock
	@echo '$(CURDIR)' > $@

$(READY): $(DEPENDENCIES) pyproject.toml
	rm -f $@
	$(PIP) install --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@touch $@

# --- for users ----------------------------------------------------------------------------------------

demo: $(READY) ## clean noisy labels, then tune a model, on bundled data; results in demo/
	$(BIN)/bilevel clean digits --trusted 100 --flip 0.5 --out demo/clean --force
	$(BIN)/bilevel tune digits --out demo/tune --force

# --- for developers -----------------------------------------------------------------------------------

test: lint types imports pytest ## every check: lint, types, imports, then the test suite

lint: $(READY) ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## ruff: repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## pyright
	$(BIN)/pyright

imports: $(READY) ## import-linter: an import only goes down, bilevel > hypergrad > solvers
	$(BIN)/lint-imports --no-logo

pytest: $(READY) ## the test suite alone
	$(BIN)/python -m pytest $(PYTEST_ARGS)

wheel: $(READY) ## build the wheel and the source archive into dist/
	$(BIN)/python -m hatchling build

# uv is used for this one step, since it resolves for all platforms and Python versions at once. Pins that
# still fit are kept.
lock: ## resolve pyproject.toml into requirements.lock again (hashed, no index address)
	test -x .lock-venv/bin/uv || { $(PYTHON) -m venv --clear .lock-venv && \
		.lock-venv/bin/python -m pip --disable-pip-version-check --quiet install uv; }
	.lock-venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --extra dev $(LOCK_ARGS) pyproject.toml -o requirements.lock

clean: ## remove caches, build outputs and results
	rm -rf demo results dist build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -path './.*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove the virtual environments
	rm -rf $(VENV) .lock-venv
