# make demo, make test: each sets up all it needs, from a bare checkout.
# PYTHON may be any of 3.11 to 3.13; VENV is where everything goes.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-all test-gpu check format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/regraft demo --out demo-output --force

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu"

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "slow and not gpu"

# TensorRT itself comes from NVIDIA and is wanted on a card alone. onnxruntime-gpu replaces
# onnxruntime in an environment of its own; it has the CPU provider too.
test-gpu: $(VENV)-gpu/.installed
	$(VENV)-gpu/bin/python -m pytest -m gpu

$(VENV)-gpu/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)-gpu
	$(VENV)-gpu/bin/python -m pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	$(VENV)-gpu/bin/python -m pip uninstall --quiet --yes onnxruntime
	$(VENV)-gpu/bin/python -m pip install --quiet --editable './runtime[cuda,tensorrt]' 'onnxruntime-gpu[cuda,cudnn]'
	touch $@

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed: constraints.txt requirements-dev.txt runtime/pyproject.toml export/pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "regraft needs Python 3.11 to 3.13; this is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-gpu .rig demo-output
