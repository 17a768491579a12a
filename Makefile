# Needs make, git and Python 3.11 to 3.13. .ci/setup installs everything into .venv, once. To choose the interpreter,
# run: make install PYTHON=/path/to/python

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast coverage check bench soak

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## install the package and its tools into .venv
	@.ci/setup

demo: install  ## run every stage once, then serve the page; ARGS="--no-serve" skips the page
	@$(BIN)/animediffusion demo $(ARGS)

# Two processes, one of which has the Ray cluster; tests/conftest.py says which tests run together, and in which order.
export PYTHONDONTWRITEBYTECODE :=  # the tests start hundreds of processes that import the package
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder

test:  ## run all tests; ARGS="tests/serve -x" runs some of them
	@.ci/setup tests
	@$(PYTEST) $(ARGS)

test-fast: install  ## run the tests that need no Ray, no other program and less than 5 s each
	@$(PYTEST) -m "not ray and not browser and not slow" $(ARGS)

coverage: install  ## run the fast tests and list the files with lines that none of them runs
	@$(PYTEST) -m "not ray and not browser and not slow" --cov --cov-report=term $(ARGS)

check: install  ## check style, types and spelling
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy -p animediffusion
	@$(BIN)/codespell

bench: install  ## run a benchmark: NAME=quality ARGS="--data URI"; without NAME, list them
ifdef NAME
	@$(BIN)/python benchmarks/$(NAME).py $(ARGS)
else
	@awk 'FNR == 1 { name = FILENAME; gsub(/benchmarks\/|\.py/, "", name); gsub(/"""/, ""); \
		if (name != "common" && name != "serving_sides") printf "%-11s %s\n", name, $$0 }' benchmarks/*.py
endif

soak: install  ## send 10,000 hostile requests to the server; ARGS="--ray" uses Ray Serve
	@$(BIN)/python benchmarks/soak.py $(ARGS)
