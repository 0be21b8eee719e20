# Every target works alone on a fresh clone that has Python 3.11 or later with pip: the first one makes
# .venv and installs requirements.txt; it is done again only when the content of that file changes.

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.requirements-$(shell cksum < requirements.txt | cut -d' ' -f1)
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check bench clean

help:  ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(STAMP)  ## Make .venv with the pinned requirements (the others do it themselves)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is needed, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@# PyTorch first and exactly: what follows then finds it and fetches no other build of it.
	$(PY) -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(PY) -m pip install --quiet -r requirements.txt
	@rm -f $(VENV)/.requirements-*
	@touch $@

demo: $(STAMP)  ## Run the demonstration on the bundled model
	$(PY) analyzer_demo.py

test: $(STAMP)  ## Run the tests that are not marked slow
	$(PYTEST) -m "not slow"

test-all: $(STAMP)  ## Run every test
	$(PYTEST)

check: $(STAMP)  ## Check format, lint, types and layout
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_layout.py

bench: $(STAMP)  ## Run every benchmark
	@set -e; for script in benchmarks/bench_*.py; do \
		echo "== $$script"; PYTHONPATH=. $(PY) "$$script"; \
	done

clean:  ## Remove what runs leave behind (.venv stays)
	rm -rf out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_model/build
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
