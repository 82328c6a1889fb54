# `make demo` and `make test` need nothing prepared but Python >= 3.11; each sets up .venv in this checkout by itself.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test lint gpu setup clean help
help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

demo: $(READY) ## train, attack, meter and fit a law on scikit-learn's digits; ends with a report (about 4 minutes)
	@$(VENV)/bin/robudget demo $(ARGS)

# Three processes on two cores, since one of them waits for a cluster or a browser most of the time; what is asked for by
# ARGS runs in one, which starts soonest. Byte code is kept even where the environment says not to: pytest's rewriting of
# all test files takes 5 s of CPU in each process.
test: $(READY) ## the tests (offline, CPU); make test ARGS="-k apgd" for some
	@PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest $(or $(ARGS),-n 3 --dist loadfile --no-loadscope-reorder)

lint: $(READY) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

gpu: ## what only a GPU can show, in ten minutes, as a block for bench/RESULTS.md; needs torch there, installs nothing
	@PYTHONPATH=src $${PYTHON:-$$(test -x $(VENV)/bin/python && echo $(VENV)/bin/python || echo $(PYTHON))} bench/gpu.py $(ARGS)

setup: $(READY) ## only the set-up

# The stamp is touched last, so that an interrupted set-up is done again.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "robudget needs Python >= 3.11; none found on the PATH (set PYTHON=/path/to/python3)" >&2; exit 2; }
	@echo "setting up $(VENV) (once)…"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@$(VENV)/bin/uv pip install --python $(VENV)/bin/python --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	@$(VENV)/bin/python -m compileall -q src
	@touch $@

clean: ## remove .venv, caches and the demo
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
