# make run   creates the environment and trains the built-in example;  make run ARGS="optimizer=adamw8bit loraplus.ratio=16"
# make test  creates the environment and runs the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
PYTEST_ARGS ?=

.PHONY: help run bench-gpu test test-slow test-gpu docs lint format wheel clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: $(VENV)/.installed ## train the built-in example; ARGS="..." passes overrides
	$(BIN)/python -m loraplus_hydra $(ARGS)

test: lint ## lint, types and the tests (about ten minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-slow: $(VENV)/.extras ## the slow tests, and those of launchers, Optuna and trackers (an hour at most)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or extras" --hypothesis-profile=random $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed ## the tests that need a GPU, which the others don't see (two minutes)
	$(BIN)/python -m pytest -n 6 -m gpu $(PYTEST_ARGS)

docs: $(VENV)/.installed ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench-gpu: $(VENV)/.installed ## measure a training step on one GPU (eight minutes at most)
	$(BIN)/python -m benchmarks.gpu

lint: $(VENV)/.installed ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove the environment and build folders
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# DeepSpeed's build needs the torch of this environment.
# Two plugins of Hydra require old packages that they do not need, so they are installed without their requirements.
$(VENV)/.extras: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[dev,tensorboard,wandb,mlflow,optuna,joblib,submitit,ray,schedulefree,harness]"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --editable ".[deepspeed]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		hydra-optuna-sweeper==1.3.0 hydra-ray-launcher==1.2.2
	touch $@
