# One verb per task; CI uses the same ones. Every verb sets itself up in .venv from Python and make alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS := .cache/smollm2
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-smollm2 demo-models experiment experiment-1k test test-slow test-kill lint format protos protos-check protos-accept kernels bench clean

help:
	@echo "make demo          a base model, four experts, one student with all their skills (minutes, two cores)"
	@echo "make demo-smollm2  two teachers teach a damaged SmolLM2-135M (minutes, two cores)"
	@echo "make experiment    the demo over three seeds with every baseline (hours), for docs/experiment.md"
	@echo "make experiment-1k one seed of it with a vocabulary of 1,036 tokens (minutes)"
	@echo "make test          unit and integration tests"
	@echo "make test-slow     pipelines killed, changed and resumed; a demo's losses against recorded ones (a quarter of an hour)"
	@echo "make test-kill     a rollout server killed at random moments, a hundred times (minutes)"
	@echo "make lint          ruff and mypy"
	@echo "make kernels       compile the GPU kernels for every architecture, without a GPU; fails if one spills"
	@echo "make bench         benchmarks against TRL, Liger and plain torch, JSON out"
	@echo "make protos        generate the protobuf modules;  protos-check: drift, lint, compatibility"
	@echo "make setup         everything for development, in $(VENV)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "OPD Mesh needs Python 3.11 or newer; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing what the demo needs into $(VENV) (torch is large; this is done once)"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing what development needs into $(VENV) (torch is large; this is done once)"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.demo

setup: $(VENV)/.dev

demo-models: $(VENV)/.demo
	$(BIN)/python recipes/prepare_smollm2.py --out $(MODELS)

# Both stages on character models, minutes on two cores. Said again it goes on where it was, or shows what it has.
demo: $(VENV)/.demo
	$(BIN)/opd run recipes/quickstart.yaml --run-dir runs/quickstart

demo-smollm2: demo-models
	$(BIN)/opd run recipes/smollm2.yaml

# One seed, whole numbers as tokens, so that a top k leaves something out: twenty minutes on two cores.
experiment-1k: $(VENV)/.demo
	$(BIN)/opd run recipes/experiment-1k.yaml --run-dir runs/experiment-1k
	$(BIN)/python -m opd_mesh.report.experiment runs/experiment-1k --docs docs --command "make experiment-1k"

# Three seeds, every baseline, a sweep for each: more than an hour on two cores. Goes on where it was.
experiment: $(VENV)/.demo
	$(BIN)/opd run recipes/experiment.yaml --run-dir runs/experiment
	$(BIN)/python -m opd_mesh.report.experiment runs/experiment --docs docs --command "make experiment"

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# What takes minutes: pipelines killed in every stage, changed and resumed; a demo's losses against recorded ones.
test-slow: $(VENV)/.demo $(VENV)/.dev demo-models
	$(BIN)/python -m pytest -m slow

# A hundred seeded runs in each mode; `make test` does a few of them.
test-kill: $(VENV)/.dev
	OPD_KILL_RUNS=100 $(BIN)/python -m pytest tests/integration/test_rollout_recovery.py -k killed --timeout 3600

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.dev
	$(BIN)/python protos/generate.py generate

protos-check: $(VENV)/.dev
	$(BIN)/python protos/generate.py check

# After a release: what clients may now rely on.
protos-accept: $(VENV)/.dev
	$(BIN)/python protos/generate.py accept

kernels: $(VENV)/.dev
	$(BIN)/python -m opd_kernels.aot

$(VENV)/.bench: $(VENV)/.dev
	@echo "installing what the benchmarks compare with into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@touch $@

# JSON lines; about half an hour on two cores.
bench: $(VENV)/.bench demo-models
	$(BIN)/python benchmarks/wire.py
	$(BIN)/python benchmarks/divergence.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/teacher_serving.py
	$(BIN)/python benchmarks/teacher_pool.py
	$(BIN)/python benchmarks/signals.py
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/async_run.py

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
