# make demo: its own .venv, installs, trains, draws, judges, reports. make test: the tests. Nothing else is needed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a process: the tests start ranks of their own, and spinning threads slow shared machines down manifold.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
# Tests run in two processes where there are two cores (JOBS=1: in one); those of a file stay together, so that its fixtures
# are made once. More than two would not fit the memory of a small machine: some start ranks of their own.
JOBS ?= $(shell test "$$(nproc --all 2>/dev/null || echo 1)" -gt 1 && echo 2 || echo 1)
PARALLEL := $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile)

.PHONY: install demo test test-slow faults soak figures proofs lint clean

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	# torch first and pinned, so that no package that names it pulls another build
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,hub,eval,remote]'
	touch $@

demo: install
	$(BIN)/longskip demo

test: install
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not gpu"

test-slow: install
	$(BIN)/python -m pytest -q $(PARALLEL) -m "slow and not gpu"

# the tests of the thirty faults, and a table; with DEFENCES=1 each defence is taken out and its tests must fail
faults: install
	$(BIN)/python -m tests.faults -j $(JOBS) $(if $(DEFENCES),--defences)

# one run killed KILLS times at random, against the unbroken run (docs/results/soak.md)
KILLS ?= 50
SEED ?= 0
soak: install
	$(BIN)/python -m tests.soak --kills $(KILLS) --seed $(SEED) --out docs/results/soak

# the figures that tests print (docs/results/main-job.md)
figures: install
	$(BIN)/python -m pytest -s -q tests/engine/test_training.py tests/engine/test_resume.py tests/engine/test_reader.py \
	  tests/engine/test_judge.py tests/engine/test_costs.py tests/models/test_specs.py tests/test_house.py | grep -aE "^figure:|passed|failed"

# every kernel in every configuration for sm_80, sm_90 and sm_100; commit what it writes with the kernels
proofs: install
	env -u TRITON_INTERPRET $(BIN)/python -m longskip.profiling.static --all --out docs/results/kernels-static.json

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
