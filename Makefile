# Everything a fresh machine needs is Python 3.11 or newer and make: `make demo`, `make test`.
# Another Python: `make test PYTHON=python3.13` (before .venv is made).

PYTHON ?= python3
BENCH_PYTHON ?= .venv-bench/bin/python
# Tests wait more than they work: for processes to start, for time to pass.
PROCESSES ?= 6
# Percent of lines and branches that tests have to run. It only rises.
COVERAGE := 95.5

BIN := .venv/bin
SOURCES := $(wildcard ratelimit_mw tests tools examples benchmarks)
# Modules with a .pxd file beside them are compiled: made again when one of them changes.
TYPES := $(shell find ratelimit_mw -name "*.pxd" 2> /dev/null)
COMPILED := hatch_build.py $(TYPES) $(wildcard $(TYPES:.pxd=.py) $(TYPES:.pxd=.pyx))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What Python compiles is kept: each of the many processes that tests start would compile it anew.
export PYTHONDONTWRITEBYTECODE :=
# Compiled modules are kept: the wheel takes those of .venv, and whoever changes one module waits for that alone.
export RATELIMIT_COMPILED_CACHE := $(CURDIR)/.compiled

.PHONY: help demo test test-quick format check-format lint types imports wheel lowest run-lowest tests docs mutants bench bench-fleet clean

help:
	@echo "make demo        run the sample API with its dashboard, and print what to try"
	@echo "make test        everything that CI runs: format, lint, types, layers, wheel, oldest neighbours, all tests"
	@echo "make test-quick  the tests without the slow drills and without coverage"
	@echo "make format      format and fix the code"
	@echo "make docs        the documentation: pages that are made of the code, and the site in site/"
	@echo "make mutants     which changes of the deciding code no test notices (hours; MUTANTS=\"money policy/policy\")"
	@echo "make bench       the load test, in an environment of its own"
	@echo "make bench-fleet a fleet: Redis' CPU by the number of workers and of nodes, idle workers, a changed live key"
	@echo "make clean       remove what all of these made"

# With what it needs and no more, and in Python alone: to compile would take a minute.
demo: .venv-demo/installed
	RATELIMIT_PURE_PYTHON=1 .venv-demo/bin/python -m ratelimit_mw demo

test: check-format lint types imports wheel lowest tests

test-quick: .venv/installed
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist worksteal -m "not slow" --quiet

format: .venv/installed
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

check-format: .venv/installed
	$(BIN)/ruff format --check .

lint: .venv/installed
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/mypy $(SOURCES)

imports: .venv/installed
	$(BIN)/lint-imports

# The wheel is built from the source distribution, and has to work where nothing but it is installed.
wheel: .venv/installed .venv-wheel/made
	rm -rf dist && mkdir dist
	$(BIN)/python -m build --no-isolation --outdir dist . > dist/build.log 2>&1 || { cat dist/build.log; exit 1; }
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz > dist/twine.log || { cat dist/twine.log; exit 1; }
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/pyroma --min 10 dist/*.tar.gz > dist/pyroma.log || { cat dist/pyroma.log; exit 1; }
	.venv-wheel/bin/python -m pip install --quiet --upgrade --force-reinstall --no-deps dist/*.whl
	.venv-wheel/bin/python -m pip install --quiet dist/*.whl
	.venv-wheel/bin/python -I tests/support/check_wheel.py $(if $(findstring none-any,$(wildcard dist/*.whl)),,--compiled)

# The oldest neighbours that the package says it works with: what touches them most. In Python alone, since what
# is compiled is the same with all of them.
LOWEST := $(addprefix tests/unit/test_,$(addsuffix .py,lifespan middleware openapi otel prometheus \
  refusals settings settings_bad settings_environment usage)) \
  $(addprefix tests/,conformance/test_conformance_windows.py integration/test_connections.py integration/test_registry.py \
  integration/test_cluster.py)

# There are no wheels of the oldest pydantic for a later Python than 3.12.
lowest: .venv/installed
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; \
	then $(MAKE) --no-print-directory run-lowest; \
	else echo "lowest: left out, since it needs Python 3.11 or 3.12"; fi

run-lowest: .venv-lowest/installed
	RATELIMIT_PURE_PYTHON=1 .venv-lowest/bin/python -m pytest --numprocesses $(PROCESSES) -m "not slow" \
	  --quiet $(LOWEST)

# All of them on the package as it was installed. Then once more in Python alone, which coverage is measured of,
# without the drills of many seconds and without those that need no second run.
tests: .venv/installed
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist worksteal
	RATELIMIT_PURE_PYTHON=1 $(BIN)/python -W "ignore:Unable to activate pytest" \
	  -m slipcover --json --out .coverage -m pytest \
	  --numprocesses $(PROCESSES) --dist worksteal -m "not slow and not once"
	$(BIN)/python -m slipcover --fail-under $(COVERAGE) --out .coverage --merge .coverage

# Strictly: a broken link or anchor is an error. The tests build it as well.
docs: .venv/installed
	$(BIN)/python -m tools.settings_reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# No part of `test`: it takes hours. `MODULES` in tests/mutants.py has the modules and their tests.
mutants: .venv/installed
	$(BIN)/python -m pip install --quiet --group mutants
	nice -n 19 $(BIN)/python -m tests.mutants $(MUTANTS)

bench: .venv-bench/installed
	$(BENCH_PYTHON) -m benchmarks.run
	$(BENCH_PYTHON) -m benchmarks.open_loop
	$(BENCH_PYTHON) -m benchmarks.start

bench-fleet: .venv/installed
	$(BIN)/python -m benchmarks.fleet
	$(BIN)/python -m benchmarks.cluster
	$(BIN)/python -m benchmarks.idle
	$(BIN)/python -m benchmarks.live_keys

clean:
	rm -rf .venv .venv-wheel .venv-lowest .venv-bench .venv-demo .nox .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	rm -rf dist build site .coverage .compiled
	find ratelimit_mw -name "*.so" -delete

# Made again only when the requirements change. pip 25.1 is the first that knows dependency groups.
.venv/installed: pyproject.toml $(COMPILED)
	$(call make-venv,.venv)
	$(BIN)/python -m pip install --quiet --editable ".[cli,metrics,otel]" --group dev
	@touch $@

.venv-demo/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv-demo
	@.venv-demo/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["dependencies"], *project["optional-dependencies"]["cli"], sep="\n")' > .venv-demo/needed.txt
	.venv-demo/bin/python -m pip install --quiet -r .venv-demo/needed.txt
	@touch $@

.venv-bench/installed: pyproject.toml $(COMPILED) $(wildcard benchmarks/requirements.txt)
	$(call make-venv,.venv-bench)
	.venv-bench/bin/python -m pip install --quiet --editable ".[cli]" -r benchmarks/requirements.txt
	@touch $@

.venv-lowest/installed: .venv/installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-lowest
	RATELIMIT_PURE_PYTHON=1 $(BIN)/uv pip install --quiet --python .venv-lowest/bin/python \
	  --resolution lowest-direct --editable ".[cli,metrics,otel]" --group lowest
	@touch $@

.venv-wheel/made: pyproject.toml
	$(call make-venv,.venv-wheel)
	@touch $@

define make-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
endef
