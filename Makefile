# `make demo` and `make test` do everything on a fresh machine with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test nightly integrations check docs format package wheel-test

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

install: $(INSTALLED)  ## create the environment with the tested set of packages

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[all]'
	touch $@

demo: $(INSTALLED)  ## train burgers2d with and without acceleration, and compare
	$(BIN)/python -m lightning_stableaa.recipes.demo

test: $(INSTALLED)  ## run all tests; PYTEST_ARGS='-m "not slow"' for the quick ones
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

nightly: $(INSTALLED)  ## 100,000 new examples of every property; STABLEAA_EXAMPLES=... for others
	STABLEAA_EXAMPLES=$${STABLEAA_EXAMPLES:-100000} \
		$(BIN)/python -m pytest tests/test_properties.py --hypothesis-show-statistics $(PYTEST_ARGS)

integrations: $(INSTALLED)  ## examples of other packages, each in its own environment; some gigabytes
	$(BIN)/python -m tests.integrations.run

check: $(INSTALLED) build/typing/lightning_stableaa  ## lint, formatting, types, spelling, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyright
	$(MAKE) --no-print-directory docs

docs: $(INSTALLED)  ## build the documentation into build/site/, without warnings
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(INSTALLED)  ## apply the formatting and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

package: $(INSTALLED)  ## build sdist and wheel into dist/, the wheel from the sdist, and check them
	rm -rf build/lib dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

wheel-test: $(INSTALLED)  ## build the wheel, install it in a clean environment and train with it
	$(BIN)/python -m pytest tests/recipes/test_wheel.py $(PYTEST_ARGS)

# The layout of the wheel, as links, for the type checker.
build/typing/lightning_stableaa: $(wildcard lightning_stableaa/*)
	rm -rf $@ && mkdir -p $@
	for path in $^; do ln -s "$(CURDIR)/$$path" $@/; done
	ln -s "$(CURDIR)/conf" "$(CURDIR)/recipes" $@/
