# calumma: `make quickstart` needs nothing but Python 3.11 and this folder.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := jobs model platform serve
PYTHON ?= $(shell for name in python3.11 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-clients check docs docs-check reference clean

help:
	@echo 'make quickstart   install into $(VENV), then train, evaluate and serve a small model (ARGS="--workdir DIR …")'
	@echo 'make install      install the pinned packages and calumma into $(VENV); does nothing when nothing changed'
	@echo 'make test         all tests (ARGS="tests/model -k name" picks some, ARGS="--cov" shows what they reach)'
	@echo 'make test-clients clients that others made (LangChain, LiteLLM, llm, lm-evaluation-harness, schemathesis) against it'
	@echo 'make check        formatting, lint, types, and what imports what'
	@echo 'make docs         the documentation as a site in build/docs/site, with the reference made from the code'
	@echo 'make docs-check   do what the guides say, command by command (ARGS="serving --workdir DIR" picks some)'
	@echo 'make reference    write the JSON schemas of specifications anew'
	@echo 'make clean        remove the environments and everything built; results in quickstart/ and mlflow/ stay'

install: $(INSTALLED)

# Installed again only when what is installed, or how, has changed.
$(INSTALLED): constraints.txt pyproject.toml infra/install.py
	@test -n "$(PYTHON)" || { echo 'error: calumma needs Python 3.11 or newer, and found neither python3.11 nor a' \
		'python3 that new. Install it (say `apt install python3.11 python3.11-venv`), or name one:' \
		'make PYTHON=/path/to/python $(MAKECMDGOALS)' >&2; exit 1; }
	@"$(PYTHON)" infra/install.py $(VENV)
	@touch $@

quickstart: $(INSTALLED)
	@$(BIN)/calumma quickstart $(ARGS)

# Two processes: one has the tests with a cluster, which mostly wait, the other one the rest (tests/conftest.py).
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS)

# The clients have an environment of their own: calumma needs none of their packages, and some would change its pins.
CLIENTS := .venv-clients
CLIENT_PINS := tests/serve/clients/constraints.txt
$(CLIENTS)/.installed: $(CLIENT_PINS) infra/install.py $(INSTALLED)
	@$(BIN)/python infra/install.py $(CLIENTS) --pins $(CLIENT_PINS)
	@touch $@

test-clients: $(INSTALLED) $(CLIENTS)/.installed
	$(BIN)/python -m pytest tests/serve/clients $(ARGS)

# mypy and import-linter do not follow setuptools' package-dir: they get a folder of links that looks as calumma is
# imported.
check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p build/types/calumma
	@for package in $(PACKAGES); do ln -sfn "../../../$$package" "build/types/calumma/$$package"; done
	$(BIN)/mypy build/types/calumma infra/install.py docs
	PYTHONPATH=build/types $(BIN)/lint-imports

docs: $(INSTALLED)
	@$(BIN)/python -m docs.build

docs-check: $(INSTALLED)
	@$(BIN)/python -m docs.check $(ARGS)

reference: $(INSTALLED)
	@$(BIN)/python -m docs.reference

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
