# Needs make, git and Python 3.11 to 3.13. Everything is installed into .venv, once; .ci/setup says how. To choose the
# interpreter: make install PYTHON=/path/to/python

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench soak

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## the package and its tools, into .venv
	@.ci/setup

demo: install  ## every stage once, ends with the page; ARGS="--no-serve" ends there
	@$(BIN)/animediffusion demo $(ARGS)

# Two processes, each with a Ray of its own: most of the time goes into waiting for Ray's processes to start. A file stays in
# one of them, and the order is that of tests/conftest.py.
test:  ## all tests; ARGS="tests/serve -x" for some
	@.ci/setup tests
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: install  ## style, types and spelling
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy -p animediffusion
	@$(BIN)/codespell

bench: install  ## one benchmark: NAME=quality ARGS="--data URI"; without NAME, which there are
ifdef NAME
	@$(BIN)/python benchmarks/$(NAME).py $(ARGS)
else
	@awk 'FNR == 1 { name = FILENAME; gsub(/benchmarks\/|\.py/, "", name); gsub(/"""/, ""); \
		if (name != "common" && name != "serving_sides") printf "%-11s %s\n", name, $$0 }' benchmarks/*.py
endif

soak: install  ## 10,000 hostile requests against the server; ARGS="--ray" on Ray Serve
	@$(BIN)/python benchmarks/soak.py $(ARGS)
