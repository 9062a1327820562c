# `make run` and `make test` set up .venv by themselves, with the exact versions in constraints.txt, and again only when
# pyproject.toml or constraints.txt changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-all lint constraints clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

run: .venv/ready
	$(BIN)/python -m smolvlm_exp
	@echo 'Before the next command, in every new terminal: . .venv/bin/activate   (Windows: .venv\Scripts\activate)'

test: .venv/ready
	$(BIN)/python -m pytest -n logical --dist loadgroup --durations=10

test-all: .venv/ready
	$(BIN)/python -m pytest -n logical --dist loadgroup --durations=10 -m 'not gpu'

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	PYTHONPATH=. $(BIN)/python docs/settings.py --check

# The newest versions that pyproject.toml allows, in a new .venv. Run `make test` with them before you commit them.
constraints:
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	echo '# Exact versions for `make run` and `make test`; written by `make constraints`.' > constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> constraints.txt
	touch .venv/ready

clean:
	rm -rf .venv
