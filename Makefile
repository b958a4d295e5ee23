# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What the API reference shows: pdoc finds no modules below one that names its contents.
PUBLIC := mosaics $(addprefix mosaics.,ops memories models inspection data training library)

# Of `make soak`.
MINUTES ?= 25

# Where several threads share few cores, those that wait by spinning take them from the others.
export OMP_WAIT_POLICY ?= PASSIVE
# Tests start many processes, which would compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart demo-model test test-conform test-clients soak screenshots lint docs wheel clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "%-14s%s\n", $$1, $$2 }' Makefile

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mosaics needs Python 3.11 or newer; set PYTHON=python3.11 (or newer) and run make again." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Apart from the rest, since transformers imports torchao wherever it finds it; --no-deps: all that they need is there.
$(VENV)/.installed-clients: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(VENV)/clients trl torchao onnx onnxscript onnx-ir onnxruntime ml-dtypes flatbuffers playwright greenlet
	touch $@

quickstart: $(VENV)/.installed  ## train a small Memory Mosaics v2, print a sample, compare it with a Transformer (4 minutes on two cores, and what installing takes)
	$(BIN)/mosaics quickstart

demo-model: $(VENV)/.installed  ## make the model anew that comes with the package as demo (half an hour on one thread)
	$(BIN)/mosaics prepare --corpus world:prose,documents=10000,tokens=176 --corpus python-reference --vocab-size 2048 --validation 0.02 --out runs/demo/data
	OMP_NUM_THREADS=1 $(BIN)/mosaics train demo --run runs/demo/run --data.prepared runs/demo/data
	$(BIN)/python -m mosaics.experiments.demo runs/demo/run src/mosaics/models/demo

test: $(VENV)/.installed-dev  ## the tests (10 minutes on two cores)
	$(BIN)/ruff check src tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup -m 'not clients and not conform and not slow'

test-conform: $(VENV)/.installed-dev  ## every memory with further options against the contract, and the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup -m '(conform or slow) and not clients'

test-clients: $(VENV)/.installed-clients  ## the tests with TRL, torchao, Accelerate, and many clients of a server (8 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 2 --dist loadgroup -m clients --ignore tests/clients
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(VENV)/clients $(BIN)/python -m pytest -q -n auto --maxprocesses 2 --dist loadgroup tests/clients

soak: $(VENV)/.installed-dev  ## the breaking tests at length, MINUTES=25 (at most 30)
	cd tests && nice -n 10 ../$(BIN)/python -m hostile.soak --minutes $(MINUTES)

screenshots: $(VENV)/.installed-clients  ## pictures of pages for the docs (needs Chromium and the quickstart's run)
	PYTHONPATH=$(CURDIR)/$(VENV)/clients $(BIN)/python docs/screenshots.py

lint: $(VENV)/.installed-dev  ## the linter alone
	$(BIN)/ruff check src tests benchmarks

docs: $(VENV)/.installed-dev  ## the API reference from the docstrings, into build/api
	$(BIN)/python -m pdoc --docformat google --math -o build/api $(PUBLIC)

wheel: $(VENV)/.installed-dev  ## the wheel, into dist
	$(BIN)/python -m hatchling build -t wheel

clean:  ## remove what the others made
	rm -rf $(VENV) build dist
