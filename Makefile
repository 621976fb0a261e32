# Two commands: `make run` and `make test`. Both do all of their set-up.
SHELL := /bin/sh
.SHELLFLAGS := -ec
.DEFAULT_GOAL := help

VENV := .venv
EXTRAS := orchestrate,serve,spark,dev
BIN := $(CURDIR)/$(VENV)/bin
PATH := $(BIN):$(PATH)
export PATH

# Telemetry of every tool is off; each variable can be overridden from outside.
export DO_NOT_TRACK ?= 1
export DVC_NO_ANALYTICS ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true
export BENTOML_DO_NOT_TRACK ?= True
export GX_ANALYTICS_ENABLED ?= false
export AIRFLOW__USAGE_DATA_COLLECTION__ENABLED ?= false

# Compiled modules are kept: without them every process compiles all that it imports anew, seconds
# each time.
unexport PYTHONDONTWRITEBYTECODE

# Tests run side by side: threads that wait for each other sleep at once.
test check: export OMP_WAIT_POLICY ?= passive
test check: export GOMP_SPINCOUNT ?= 0

# The first interpreter that runs and is new enough, unless PYTHON names one.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help run test check up down clean setup system

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

setup: $(VENV)/.installed ## make .venv with everything in it

# pip's find-links are handed to uv, which does not read pip's configuration. uv wants commas.
define install
	@links="$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || echo "$${PIP_FIND_LINKS:-}")"; \
	[ -z "$$links" ] || export UV_FIND_LINKS="$$(echo $$links | tr ' ' ',')"; \
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[$(1)]'
	@touch $@
endef

# What is imported first is compiled first. Of what was just installed, this does it on the core that
# the first stages leave idle, in the order in which it will be needed.
IMPORTS := import great_expectations, ibis, duckdb, torch, lightgbm, mlflow.models, scipy.stats, bentoml

# What `make run` needs is installed first: the rest takes six times as long.
$(VENV)/.runs: pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "Forecart needs Python 3.11, 3.12 or 3.13; none was found. Set PYTHON=..." >&2; exit 2; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@[ -x $(BIN)/uv ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@echo "Installing the pinned dependencies into $(VENV) (a few minutes the first time, none the next)"
	$(call install,serve)
	@nice -n 10 $(BIN)/python -c '$(IMPORTS)' >/dev/null 2>&1 &

$(VENV)/.installed: $(VENV)/.runs
	@echo "Installing Airflow, Spark and the tools for tests into $(VENV)"
	$(call install,$(EXTRAS))

run: $(VENV)/.runs ## events -> validated data, trained and compared models, verdict, Bento
	@forecart run
	@forecart summary

test: $(VENV)/.installed system ## every test, integration tests with the real components included
	@pytest -m "not integration" -n 2 -q
	@pytest -m integration -n 2 --dist loadfile -q

check: $(VENV)/.installed ## lint, types, layers and unit tests: under two minutes
	@ruff check . && ruff format --check . && mypy && lint-imports
	@pytest -m "not integration" -n 2 -q

system: ## Debian packages that some integration tests need, where apt is allowed
	@BIN="$(BIN)" sh tests/system_packages.sh

up: $(VENV)/.installed ## start Airflow, MLflow and the service
	@forecart up

down: ## stop what `make up` started
	@[ ! -x $(BIN)/forecart ] || forecart down

# The registry goes, so champion.json, which names a model in it, goes back to what is committed.
clean: down ## remove everything that the targets made
	@git checkout --quiet -- champion.json 2>/dev/null || true
	@rm -rf $(VENV) data models reports build mlflow.db* mlartifacts mlruns .forecart .dvc/cache .dvc/tmp dvc.lock \
		.mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info
