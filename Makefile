# make demo: the page. make test: every check that needs no GPU. make test-gpu: the kernels compiled, on a CUDA device.
# Each creates the environment it needs.
PYTHON ?= python3
PORT ?= 7860
BIN = .venv/bin

.PHONY: demo test test-browser test-suite test-interpreted test-gpu lint
demo: .venv/.compiled
	PORT=$(PORT) $(BIN)/python serve.py

# All side by side. Triton's interpreter and the linters need no compiled kernels: they have what compiling leaves. The
# engine's tests take longest, most of the time on one core; the interpreter has what they and the browser's leave.
test:
	$(MAKE) --jobs=4 --output-sync=line test-interpreted lint test-browser test-suite

test-browser: .venv/.compiled .venv/.installed-dev
	$(BIN)/python -m pytest -q tests/browser

test-suite: .venv/.compiled .venv/.installed-dev
	$(BIN)/python -m pytest -q tests --ignore=tests/browser --ignore=tests/kernels --ignore=tests/gpu

# In a process of its own: the interpreter is chosen when Triton is imported.
test-interpreted: .venv/.installed-dev
	@if $(BIN)/python -c "import triton" 2>/dev/null; then \
	  echo "The kernels, interpreted:" && TRITON_INTERPRET=1 nice -n 19 $(BIN)/python -m pytest -q tests/kernels; \
	else echo "tests/kernels is left out: there is no Triton for this platform."; fi

test-gpu: .venv/.compiled .venv/.installed-dev
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -q tests/gpu tests/kernels

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -r requirements.txt
	touch $@

.venv/.compiled: .venv/.installed
	@echo "Compiling the kernels for this processor, once: about a minute."
	$(BIN)/python -m moespec generate Hello --budget 16 --max-new-tokens 8 >/dev/null
	touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -r requirements-dev.txt
	touch $@
