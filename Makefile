# Two commands: `make train` trains a reversible ResNet with PETRA, `make test` runs the whole suite.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= ds_configs/petra.json
ARGS ?=

# DeepSpeed compiles a small extension at its first start, under a lock file that a killed process leaves behind and that
# another environment's build would fight over; so each environment has its own.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions

# In whatever is started here, threads of OpenMP sleep while they wait for one another: ds_decoupled/threads.py says why.
export OMP_WAIT_POLICY ?= passive

.PHONY: train test lint install clean

install: .venv/installed

# The constraints file is a tested set of versions.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[recipes,dev]'
	touch $@

train: install
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed recipes/train_resnet.py --deepspeed_config $(CONFIG) $(ARGS)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: install
	$(BIN)/ruff check ds_decoupled recipes tests
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info runs
