# make help lists the targets. PYTHON picks the interpreter that .venv is made with.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
PYTEST_ARGS ?=
bin := .venv/bin
one_thread := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup table5 test lint bench published

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv and install into it (says how much; nothing to do the second time)
	@PYTHON="$(PYTHON)" scripts/setup.sh

# The last row of the paper's Table 5 on the embedded data set; the runner of whole tables comes with the study.
table5: setup ## set up, then the main job: ViLaDiff on the embedded data set
	$(bin)/viladiff train method.name=viladiff data.dataset=digits data.split=183

test: setup lint ## set up, then lint and tests
	$(one_thread) $(bin)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: setup ## ruff and mypy
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

bench: setup ## every claim about speed, as ratios measured in one run each
	@for file in benchmarks/*.py; do \
		[ -e "$$file" ] || { echo "no benchmarks yet"; exit 0; }; \
		echo "== $$file"; $(one_thread) $(bin)/python "$$file" || exit 1; done

published: setup ## continue the campaigns behind the committed reports and render these again (hours)
	$(one_thread) $(bin)/python scripts/core_curves.py
	@for file in reports/render_*.py; do \
		[ -e "$$file" ] || { echo "no published reports yet: they come with the study"; exit 0; }; \
		echo "== $$file"; $(bin)/python "$$file" || exit 1; done
