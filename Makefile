# Two commands on a fresh machine: `make quickstart` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: install quickstart test test-all test-gpu clean
install: $(VENV)/.installed

# torch first, at its pin, so that nothing after it brings another; DeepSpeed builds against the torch that is there.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is older than 3.11; make PYTHON=python3.11")'
	@echo "making $(VENV) with the pins of constraints.txt; a few minutes, most of them for torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch setuptools wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --disable-pip-version-check -q \
		--no-build-isolation -c constraints.txt -e ".[test]"
	touch $@

quickstart: install
	$(BIN)/python launch/quickstart.py

test: install
	$(BIN)/python -m pytest tests -m "not slow"

# With those that take over 20 seconds each, which need SLURM.
test-all: install
	$(BIN)/python -m pytest tests

# On a machine with a CUDA device, in an environment of your own with the package and its tests' needs (PYTHON=python3).
test-gpu:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/test_gpu.py tests/test_kernel_*.py -m gpu

clean:
	rm -rf $(VENV) build *.egg-info
