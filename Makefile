# make train [RECIPE=toy_cpu] [NPROC=2] [ARGS="--steps 10"]     make test     `make help` lists the rest

RECIPE ?= toy_cpu
NPROC ?= 2
ARGS ?=
PYTHON ?= python3
TORCH ?= torch==2.13.0
# where torch comes from, when not from pip's own index: https://download.pytorch.org/whl/cpu spares a machine without a GPU some gigabytes
TORCH_INDEX ?=

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
# SGLang runs in an environment of its own: its dependencies never have to agree with the trainer's
SGLANG := .sglang
SGLANG_PINS := requirements/sglang-cpu.txt
SGLANG_INSTALLED := $(SGLANG)/installed

.PHONY: help install sglang train test test-all lint bench toy-figures ablations report clean
.DELETE_ON_ERROR:

help:
	@echo "make install                 create .venv and install everything into it (PYTHON=python3.12, TORCH_INDEX=URL)"
	@echo "make sglang                  create .sglang for --rollout.engine sglang on a CPU: 3.4 GB (PYTHON=python3.12, TORCH_INDEX=URL)"
	@echo "make train                   install, then run a recipe (RECIPE=toy_cpu NPROC=2 ARGS='--steps 10')"
	@echo "make test                    install, then the tests (ARGS='-k swap')"
	@echo "make test-all                the tests and the slow ones (every layout of every family): most of an hour"
	@echo "make lint                    ruff and pyright"
	@echo "make bench                   the benchmarks, one after the other"
	@echo "make toy-figures             the README's toy figures: six whole runs, half an hour (NPROC=2 ARGS='--seeds 0 1 2')"
	@echo "make ablations               the paper's ablations in miniature: 24 small runs, half an hour (NPROC=2 at a time)"
	@echo "make report RUN=runs/NAME    write the run's report.html"
	@echo "make clean                   remove .venv, .sglang and caches; runs/ stays"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Tandem needs Python 3.11 or later; $(PYTHON) is %d.%d. Set PYTHON=python3.11 (or later)." % v[:2])'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) (some minutes the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "Installing Tandem and what it needs"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@mkdir -p $(VENV)/links/tandem
	@ln -sfn ../../../engine $(VENV)/links/tandem/engine
	@ln -sfn ../../../kernels $(VENV)/links/tandem/kernels
	@touch $@
	@echo "Installed into $(VENV)"

sglang: $(SGLANG_INSTALLED)

$(SGLANG_INSTALLED): $(SGLANG_PINS)
	@test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	@echo "Installing SGLang into $(SGLANG) (some minutes the first time)"
	@$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' $(SGLANG_PINS))"
	@$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(SGLANG_PINS)
	@touch $@

train: install
	$(VENV)/bin/tandem train $(RECIPE) --nproc $(NPROC) $(ARGS)

test: install
	$(PY) -m pytest $(ARGS)

test-all: install
	$(PY) -m pytest -m "" $(ARGS)

lint: install
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright

bench: install
	@set -e; for script in $(filter-out benchmarks/toy_%.py benchmarks/ablations%.py benchmarks/curate_%.py benchmarks/harness.py benchmarks/instruments.py benchmarks/loop_table.py benchmarks/results.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(PY) $$script; done

toy-figures: install
	$(PY) benchmarks/toy_seeds.py --nproc $(NPROC) $(ARGS)

ablations: install
	$(PY) benchmarks/ablations.py --jobs $(NPROC) $(ARGS)

report: install
	@test -n "$(RUN)" || { echo "name the run folder: make report RUN=runs/toy_cpu"; exit 2; }
	$(VENV)/bin/tandem report $(RUN)

clean:
	rm -rf $(VENV) $(SGLANG) build dist *.egg-info .pytest_cache .ruff_cache
