# `make quickstart` and `make test` do all their own set-up in .venv, and are quick when run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Two processes on few cores: threads that spin while they wait slow each other 30-fold.
export OMP_WAIT_POLICY ?= passive

.PHONY: quickstart road rehearsal benchmarks gpu-check test test-fast test-slow drills lint types structure docs format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

quickstart: $(READY)
	$(BIN)/yolo-lightning quickstart

# the steps from YOLO to YOLOv2 in miniature; options by ARGS, such as ARGS='--seed 1'
road: $(READY)
	$(BIN)/python -m tests.benchmarks.road $(ARGS)

# joint training at its true size, for a few steps, on two nodes of this machine
rehearsal: $(READY)
	$(BIN)/python -m tests.benchmarks.rehearsal $(ARGS)

# ratios of speed and memory to alternatives, into docs/benchmarks.md; one subject: ARGS='--only step'
benchmarks: $(READY)
	$(BIN)/python -m tests.benchmarks $(ARGS)

# on a machine with a GPU, 10 minutes; without one: ARGS='--device cpu --tiny'
gpu-check: $(READY)
	$(BIN)/python -m tests.benchmarks.gpu_check $(ARGS)

# one process a core, with one thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8
ORDINARY := not slow and not cluster and not browser

test: $(READY)
	$(PYTEST) -m "$(ORDINARY)"

# without trainings from end to end and processes of their own
test-fast: $(READY)
	$(PYTEST) -m "$(ORDINARY) and not end_to_end"

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow or cluster or browser"

# kills, outages, hostile inputs, and the memory of a long training
drills: $(READY)
	$(BIN)/python -m pytest -m slow tests/drills tests/tracking/test_server.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(READY)
	$(BIN)/mypy

# lines, docstrings and imports by package
structure:
	$(PYTHON) -m tests.helpers.structure

# the site: open build/site/index.html
docs: $(VENV)/.docs-ready
	rm -rf build/site
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet \
		--conf-dir docs --doctree-dir build/doctrees . build/site

$(VENV)/.docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
