# Two commands are enough on a machine with python3, git and make:  make retrain   and   make test
# `UV` can name an existing uv; otherwise one is installed into .uv/ from the package registry.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
unexport PYTHONDONTWRITEBYTECODE        # bytecode halves every start
export UV_LINK_MODE ?= copy
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV ?= .uv/bin/uv
ARGS ?=
WORKERS ?= 2

help: ## show this help
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

.uv/bin/uv:
	@echo "installing uv into .uv/"
	@$(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.installed: requirements.lock pyproject.toml | $(if $(filter .uv/bin/uv,$(UV)),.uv/bin/uv)
	@echo "installing the locked packages into $(VENV)/"
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	@$(UV) pip sync --quiet --python $(BIN)/python --compile-bytecode --require-hashes requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode --editable .
	@touch $@

install: $(VENV)/.installed ## install the locked packages into .venv/, compiled

retrain: $(VENV)/.installed ## run the main job on what is in data/raw/
	@$(BIN)/regraft retrain $(ARGS)

test: $(VENV)/.installed ## units, contracts, kills and the whole job (under 15 minutes on two cores)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not faults and not service and not extended and not gpu" \
		--cov --cov-report=term $(ARGS)

test-faults: $(VENV)/.installed ## every kill point of every stage
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "faults" $(ARGS)

llama-cpp: $(VENV)/.installed ## compile llama-cpp-python into .venv/ (once, 5 to 10 minutes), for tests and exports of GGUF
	@$(BIN)/python -c "import llama_cpp" 2>/dev/null || \
		flock .venv/.llama.lock $(UV) pip install --quiet --python $(BIN)/python llama-cpp-python

test-services: $(VENV)/.installed ## a Prefect server with two workers, and what else needs servers
	@$(BIN)/python -m pytest -m "service" $(ARGS)

test-extended: $(VENV)/.installed ## what trains, merges or prepares for minutes
	@$(BIN)/python -m pytest -m "extended" $(ARGS)

PY312 := $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) $(shell command -v python3.12))
py312: ## the python3.12 that `make test-py312` would use, if there is one
	@echo $(PY312)

test-py312: | $(if $(filter .uv/bin/uv,$(UV)),.uv/bin/uv) ## train, evaluate and export on Python 3.12 (needs a python3.12)
	@test -n "$(PY312)" || { echo "no python3.12 here: nothing was tested on it"; exit 1; }
	@test -x .venv-3.12/bin/python || $(UV) venv --quiet --python $(PY312) .venv-3.12
	@$(UV) pip sync --quiet --python .venv-3.12/bin/python --compile-bytecode --require-hashes requirements.lock
	@$(UV) pip install --quiet --python .venv-3.12/bin/python --no-deps --compile-bytecode --editable .
	@.venv-3.12/bin/python -m pytest -m "not faults and not service and not extended and not gpu and not slow" \
		tests/model tests/train tests/evaluate tests/export $(ARGS)

bench: $(VENV)/.installed ## measure the whole job on this machine and keep the figures in bench/results/
	@$(BIN)/python bench/job.py --json bench/results/job.json

lint: $(VENV)/.installed ## format check, lint, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(VENV)/.installed ## write the format, mend what the linter can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: | .uv/bin/uv ## resolve requirements.lock anew
	@$(UV) pip compile --quiet --universal --all-extras --generate-hashes --no-emit-index-url --no-header \
		--python-version 3.11 pyproject.toml -o requirements.lock
	@$(PYTHON) infra/versions.py

clean: ## remove what stages made (data/work/); the registry and the exports stay
	@rm -rf data/work

.PHONY: help install py312 retrain test test-faults test-services test-extended test-py312 bench lint format lock clean
