# Everything sets itself up: `make demo` and `make test` need Python 3.11 and make, nothing else.

PYTHON ?= python3.11
VENV   := .venv
CLIENTS := .venv-clients
BIN    := $(VENV)/bin
DEMO   := runs/demo
RANKS  ?= 2

# One thread a process: the tests start several, and more threads than cores only fight each other.
export OMP_NUM_THREADS := 1

# Ranks wait for each other a third of the time, so two tests at a time fill two cores.
TEST   := $(BIN)/python -m pytest -n 2 --dist worksteal

DEEPSPEED := $(BIN)/deepspeed --num_gpus $(RANKS) --bind_cores_to_rank
TRAIN     := examples/train_gpt.py --deepspeed --deepspeed_config examples/configs/zero2.json

.PHONY: help venv demo test test-all test-clients lint clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo          train, save, resume, export and sample a 3 M parameter GPT on 2 CPU processes"
	@echo "make test          the tests that take seconds        make test-all      the slow ones, too"
	@echo "make test-clients  Transformers to Lightning           make lint          ruff, mypy, layers"
	@echo "make venv          the environment alone              make clean         outputs; distclean: $(VENV), too"

# ---- Environment: done once, and again when the pins or the metadata change ----

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,clients]'
	touch $@

# ---- Demo: every line fails the target if what it shows is not so ----

demo: $(VENV)/.ready
	rm -rf $(DEMO)
	@echo "== 1. train 400 steps: ZeRO-2, bf16, $(RANKS) processes"
	$(DEEPSPEED) $(TRAIN) --steps 400 --save $(DEMO)/checkpoint
	@echo "== 2. resume in a new launch, and go on to step 500"
	$(DEEPSPEED) $(TRAIN) --resume $(DEMO)/checkpoint --steps 500 --save $(DEMO)/checkpoint
	@echo "== 3. consolidate to fp32 with the script that lies in the checkpoint"
	$(BIN)/python $(DEMO)/checkpoint/zero_to_fp32.py $(DEMO)/checkpoint $(DEMO)/weights
	@echo "== 4. load the weights in plain torch: the same validation loss, below 2.4 nats per byte, and a sample"
	$(BIN)/python examples/eval_plain_torch.py $(DEMO)/weights --expect $(DEMO)/checkpoint/result.json --below 2.4 --sample 400

# ---- Tests and checks ----

test: $(VENV)/.ready
	$(TEST) -m "not slow and not gpu"

test-all: $(VENV)/.ready
	$(TEST)

test-clients: $(CLIENTS)/.ready
	$(CLIENTS)/bin/python -m pytest -m client tests/clients

$(CLIENTS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,clients,all-clients]'
	touch $@

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_layers.py

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(CLIENTS)
