# Needs make, git and Python 3.11 to 3.13 with venv. Everything is installed into .venv, once.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The environment in which pip builds the package obeys the pins, too: by the one variable in old pips, the other in new.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip --disable-pip-version-check

# The first Python that fits; `make PYTHON=/path/to/python install` chooses another.
FITS := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	if $$name -c '$(FITS)' >/dev/null 2>&1; then command -v $$name; break; fi; done)

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench soak

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## the package and its tools, into .venv

demo: $(STAMP)  ## every stage once, ends with the page; ARGS="--no-serve" ends there
	@$(BIN)/animediffusion demo $(ARGS)

# Two processes, each with a Ray of its own: most of the time goes into waiting for Ray's processes to start. A file stays in
# one of them, and the order is that of tests/conftest.py.
test: $(STAMP)  ## all tests; ARGS="tests/serve -x" for some
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP)  ## style and types
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy -p animediffusion

bench: $(STAMP)  ## one benchmark: NAME=quality ARGS="--data URI"; without NAME, which there are
ifdef NAME
	@$(BIN)/python benchmarks/$(NAME).py $(ARGS)
else
	@awk 'FNR == 1 { name = FILENAME; gsub(/benchmarks\/|\.py/, "", name); gsub(/"""/, ""); \
		if (name != "common" && name != "serving_sides") printf "%-11s %s\n", name, $$0 }' benchmarks/*.py
endif

soak: $(STAMP)  ## 10,000 hostile requests against the server; ARGS="--ray" on Ray Serve
	@$(BIN)/python benchmarks/soak.py $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 with venv; install one, or set PYTHON=" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), some minutes the first time"
	@$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
