# Two commands: `make demo` trains a small reasoning model from nothing, `make test` runs the tests that judge a change.
# Both set up what they need in .venv; outside the clone they only fill caches.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# What a run needs comes with its hash checked. Left to pip are torch, whose build depends on the machine, and the tools of
# the tests; both in the versions of constraints.txt. Our own package is built with the setuptools of the lock.
INSTALL := $(PIP) --require-hashes --no-deps -r requirements.lock && $(PIP) --no-build-isolation -c constraints.txt

.PHONY: demo test test-all core lint types coverage site clean

demo: $(VENV)/.demo
	$(BIN)/bessemer run tiny

# One core per test process: OpenMP threads that share cores stall.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

# The slow tier too: what takes seconds or needs a browser, Ray, Triton's interpreter or many processes.
test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The deletion test: without any add-on the core's tests pass and the tiny recipe runs.
core: $(VENV)/.dev
	$(BIN)/python tools/core.py --alone -- -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

types: $(VENV)/.dev
	$(BIN)/mypy

# The tests again with coverage, whose pages are in build/coverage; about half as long again (Python 3.12 and later measure at little cost).
coverage: $(VENV)/.dev
	COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term --cov-report=html:build/coverage

# The documentation as a site, in build/site/site; links are checked, and its search must answer what users ask.
site: $(VENV)/.dev
	$(BIN)/python .ci/site_pages.py build/site
	cd build/site && ../../$(BIN)/zensical build --strict
	$(BIN)/python .ci/site_pages.py --languages build/site/site
	$(BIN)/python .ci/search/install.py build/site/site
	$(BIN)/python .ci/search/ask.py build/site/site --least 18

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Bessemer needs Python 3.11 or newer, and $$($(PYTHON) --version) was found; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of packages: a second call costs nothing, and a changed pyproject.toml installs again.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt requirements.lock
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml claims/pyproject.toml vectors/pyproject.toml constraints.txt requirements.lock
	$(INSTALL) -e '.[dev]' -e ./claims -e ./vectors
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist src/*.egg-info claims/src/*.egg-info vectors/src/*.egg-info
