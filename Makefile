# Everything a newcomer needs: `make demo`, then `make test`. Both rest on one full install into .venv.
# PIP_ARGS is passed on to every pip install, e.g. `make demo PIP_ARGS=--no-index`.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs-installed
EXAMPLES_STAMP := $(VENV)/.examples
BENCH := .venv-bench
BENCH_STAMP := $(BENCH)/.installed

# Where it is set, each process of the tests and of the demo compiles everything it imports once more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo examples test test-long test-cuda test-stock lint bench bench-exact docs docs-serve install clean help

help:
	@echo "make demo        install, then train a new run on scikit-learn's digits"
	@echo "make examples    all other examples, small, with what they need (transformers, optuna) installed as well"
	@echo "make test        install, then run the tests (at most 6 minutes on 2 cores)"
	@echo "make test-long   the longer tests as well"
	@echo "make test-cuda   the tests that trainings on a CUDA device are to pass, on one"
	@echo "make test-stock  the tests of the transitions project, with CompiledMachine in place of Machine"
	@echo "make lint        ruff, mypy --strict, import-linter"
	@echo "make docs        the documentation as a site in site/, built strictly; make docs-serve shows it while it is written"
	@echo "make bench       how fast it is, beside others, in an environment of its own; WRITE=1 writes benchmarks/RESULTS.md and draws it"
	@echo "make bench-exact the table of docs/exactness.md and the pairs of docs/migrating.md, in that environment; WRITE=1 writes the table there"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) pip setuptools
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) --no-build-isolation -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/digits.py

$(EXAMPLES_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) --no-build-isolation -e '.[examples]'
	touch $(EXAMPLES_STAMP)

# Small, in a folder of their own, so that each is done from its beginning.
examples: $(EXAMPLES_STAMP)
	$(BIN)/python examples/run_all.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not long"

test-long: $(STAMP)
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest -n 2 --dist loadgroup

test-cuda: $(STAMP)
	INTERLOCK_TEST_CUDA=1 $(BIN)/python -m pytest -n 8 -m "device and not long"

test-stock: $(STAMP)
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python tests/stock/run_stock_tests.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typed_user.py
	$(BIN)/lint-imports

# Installed by those who build the site only: it takes half a minute.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) --no-build-isolation -e '.[docs]'
	touch $(DOCS_STAMP)

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

docs-serve: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

$(BENCH_STAMP): pyproject.toml constraints.txt benchmarks/exact/requirements.txt Makefile
	$(PYTHON) -m venv --clear $(BENCH)
	$(BENCH)/bin/python -m pip install -q -c constraints.txt $(PIP_ARGS) pip setuptools
	$(BENCH)/bin/python -m pip install -q -c constraints.txt $(PIP_ARGS) -r benchmarks/exact/requirements.txt
	$(BENCH)/bin/python -m pip install -q -c constraints.txt $(PIP_ARGS) --no-build-isolation -e .
	touch $(BENCH_STAMP)

bench: $(BENCH_STAMP)
	$(BENCH)/bin/python benchmarks/speed/table.py $(if $(WRITE),--write)

bench-exact: $(BENCH_STAMP)
	$(BENCH)/bin/python benchmarks/exact/table.py $(if $(WRITE),--write)
	$(BENCH)/bin/python tests/migrations.py

clean:
	rm -rf $(VENV) $(BENCH) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build site *.egg-info
