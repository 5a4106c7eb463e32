# Every target sets up .venv by itself, and again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: study test lint clean

study: $(READY)      ## train one small PLT per loop count on Python's own source, and report
	$(BIN)/parloop study --preset quick

test: $(READY)       ## the whole suite
	$(BIN)/pytest

lint: $(READY)       ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:               ## everything that can be made again, except runs/
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt -e '.[train,test,lint]'
	touch $@
