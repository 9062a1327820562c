# `make run` and `make test` set up .venv by themselves, again only when pyproject.toml changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-all lint clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

run: .venv/ready
	$(BIN)/python -m smolvlm_exp

test: .venv/ready
	$(BIN)/python -m pytest -n logical --dist loadgroup

test-all: .venv/ready
	$(BIN)/python -m pytest -n logical --dist loadgroup -m 'not gpu'

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf .venv
