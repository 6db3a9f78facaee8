# make demo: from a bare checkout to a smaller, faster, measured model. make test: the tests. make check: lint, types.
# make fuzz: 20 000 hostile model files.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install -c constraints.txt
# TVM links the library it compiles: with the system's linker, else with one from PyPI.
CROSS := $(if $(shell command -v g++ || command -v gcc || command -v clang || command -v ld || command -v ld.lld),,[cross])

.PHONY: install demo test test-all fuzz check clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "graphopt needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.$(CROSS)'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/graphopt optimize examples/digits/digits.onnx -o out/digits --preset int8 \
	  --calib examples/digits/calib.npz --eval examples/digits/eval.npz \
	  --threads 1 --tune-seconds 20 --measure-seconds 10 --overwrite

# Files side by side, one a processor: the tests of one file share what they build.
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test: $(VENV)/.installed-dev
	$(PYTEST) -m 'not long'

test-all: $(VENV)/.installed-dev
	$(PYTEST)

# Hostile model files, for the night; CASES=N for fewer, SEED=N for others.
CASES ?= 20000
SEED ?= 0
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(SEED)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
