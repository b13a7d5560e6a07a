# make demo: the page. make test: every check there is. Both create the environment they need.
PYTHON ?= python3
PORT ?= 7860
BIN = .venv/bin

.PHONY: demo test lint
demo: .venv/.installed
	PORT=$(PORT) $(BIN)/python serve.py

test: lint
	$(BIN)/python -m pytest -q

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@echo "Compiling the kernels for this processor, once: about a minute."
	$(BIN)/python -m moespec generate Hello --budget 16 --max-new-tokens 8 >/dev/null
	touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@
