# Needs Python 3.10 or newer (with venv) and make; everything else comes into .venv.
#   make PYTHON=python3.13 …        another Python for the virtual environment
#   make test ARGS='-k doorbell'    more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# Touched last: an interrupted installation is done again, a finished one costs nothing and needs no network.
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.PHONY: help demo test test-rabbitmq lint format docs chaos stress bench bench-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## Show notifications become finished tasks: Postgres, Valkey, bridge and worker as real processes
	$(BIN)/pgpubsub-bridge demo --once

# Half of the time is processes starting: two at once take little more than half as long. Each of pytest's processes has
# a server pair of its own. More than four would only wait for each other's disk.
test: $(STAMP) ## Run all tests, with their own Postgres and Valkey
	$(BIN)/python -m pytest -q --durations=10 -n logical --maxprocesses=4 --dist=worksteal $(ARGS)

# Not a part of `test`: its server is no wheel. Without one every test fails, and says what to install.
test-rabbitmq: $(STAMP) ## Run the tests on a real RabbitMQ, with a node of their own: needs the package rabbitmq-server
	$(BIN)/python -m pytest -q --durations=5 tests/rabbitmq $(ARGS)

lint: $(STAMP) ## Check style, format, types and import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMP) ## Build the site into build/docs, from docs/ and docstrings; warnings are errors
	$(BIN)/python docs/settings_table.py
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/docs
	@echo "build/docs/index.html"

chaos: export CHAOS_NOTIFICATIONS ?= 20000
chaos: export CHAOS_FAULTS ?= 250
chaos: export CHAOS_PAUSE ?= 2
chaos: $(STAMP) ## Kill and cut at random: CHAOS_NOTIFICATIONS, CHAOS_FAULTS, CHAOS_PAUSE, CHAOS_SEED say how much
	$(BIN)/python -m pytest -q tests/chaos $(ARGS)

stress: export STRESS_COMMITS ?= 1000000
stress: export STRESS_CLAIM_SCALE ?= 17
stress: $(STAMP) ## A million commits while bridges sleep, wake, hang and die, and claims from five million rows
	$(BIN)/python -m pytest -q --timeout=3600 tests/stress tests/integration/test_claim_plan.py $(ARGS)

bench: $(BENCH_STAMP) ## Measure beside peers, and write docs/benchmarks.md: about 20 minutes, on a quiet machine
	$(BIN)/python -m bench $(ARGS)

bench-check: $(BENCH_STAMP) ## Measure a little, and say which ratios got worse than the stored ones
	$(BIN)/python -m bench --check $(ARGS)

clean: ## Remove caches and build products; the virtual environment stays
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find pgpubsub_celery tests -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than Python 3.10: make PYTHON=python3.13 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# The peers, and what draws: nobody else needs them.
$(BENCH_STAMP): $(STAMP) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,bench]'
	@touch $@
