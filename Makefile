SHELL := bash
.DEFAULT_GOAL := help

# make test PYTHON=python3.12   another interpreter than the newest that is found
# make test ARGS="-k files"     more words for the program that the target runs
PYTHON ?=
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help demo test check contract bench bench-full bench-server bench-server-full soak venv clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: venv ## run the package on real input: examples/demo.py
	$(RUN) examples/demo.py $(ARGS)

test: venv ## run every test
	$(RUN) -m pytest $(ARGS)

check: venv ## lint, formatting and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy --strict cloud

contract: venv ## run only the suite that every backend must pass
	$(RUN) -m pytest tests/contract $(ARGS)

bench: venv ## measure speed, in short
	$(RUN) -m benchmarks $(ARGS)

bench-full: venv ## measure speed beside every installable peer
	$(RUN) -m benchmarks --full $(ARGS)

bench-server: venv ## measure the speed of a server, in short
	$(RUN) -m benchmarks.server $(ARGS)

bench-server-full: venv ## measure the speed of a server beside RQ, Celery and Ray
	$(RUN) -m benchmarks.server --full $(ARGS)

soak: venv ## break a server in every known way, for a quarter of an hour
	$(RUN) -m tests.faults.soak $(ARGS)

venv:
	@bash .ci/venv $(VENV) '$(PYTHON)'

clean: ## remove what the other targets made
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* datalogs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
