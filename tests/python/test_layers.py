"""Includes and imports keep to the layers of docs/design.md, read off the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {".hpp", ".cpp", ".cu", ".cuh"}

# A folder of csrc -> those that it may include.
MAY_INCLUDE = {
    "base": set(),
    "schedule": {"base", "schedule/prefetch", "schedule/eviction"},
    "schedule/prefetch": {"base", "schedule"},
    "schedule/eviction": {"base", "schedule"},
    "store": {"base"},
    "device": {"base", "device/host", "device/cuda"},
    "device/copy": {"base", "device"},
    "device/host": {"base", "device", "device/copy"},
    "device/cuda": {"base", "device", "device/copy"},
    "compute": {"base", "device"},
    "compute/host": {"base", "device", "compute"},
    "compute/cuda": {"base", "device", "device/cuda", "compute"},
    "runtime": {
        *("base", "schedule", "schedule/prefetch", "store"),
        *("device", "device/copy", "device/cuda", "compute", "compute/cuda"),
    },
    "bindings": {"base", "runtime", "schedule", "store", "device", "device/copy", "device/cuda"},
}
# A package or module of spmoe -> the others that it may import; no package is here in a circle.
NEAR = {"arguments", "config", "errors", "policies", "settings", "prompts"}  # for all
PACKAGES = {
    "system": {"_core"},
    "reporting": {"_core", "system"},
    "runtime": {"_core", "reporting", "system"},
    "models": {"_core", "reporting", "runtime", "store", "system"},
    "prediction": {"models", "reporting", "system"},
    "costs": {"models", "prediction", "reporting", "runtime", "system"},
    "decoding": {"costs", "models", "reporting", "runtime", "system"},
    "engine": {"costs", "decoding", "models", "prediction", "reporting", "runtime", "system"},
    "loader": {"costs", "decoding", "engine", "models", "reporting", "system"},
    "bench": {
        *("costs", "decoding", "engine", "loader", "models", "prediction", "reporting"),
        *("runtime", "system"),
    },
    "demo": {"prediction", "reporting"},
    "doctor": {"bench", "demo", "reporting", "runtime", "store", "system"},
    "cli": {"bench", "costs", "decoding", "demo", "doctor", "engine", "reporting", "spmoe"},
}
# A library -> the only modules of spmoe that may import it.
MAY_IMPORT = {
    "transformers": {"models/", "decoding/pairing", "demo"},
    "spmoe._core": {
        "reporting/counters",
        "runtime",
        "policies",
        "system/devices",
        "models/experts",
        "errors",
        "store",
    },
}
PURE = {
    "config",
    "costs/costs",
    "costs/cutoff",
    "decoding/acceptance",
    "decoding/draft_length",
    "decoding/ema",
    "decoding/generation",
    "decoding/planner",
    "decoding/prior",
    "decoding/turns",
    "reporting/metrics",
    "system/machine",
}  # neither torch nor _core


def includes(file: Path) -> list[str]:
    return re.findall(r'^#include "([a-z_/]+)/', file.read_text(), re.MULTILINE)


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not for type checkers either: a circle of names is one file in several parts."""
    package = ROOT / "python"
    modules = {
        ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): file
        for file in package.rglob("*.py")
    }
    left = {}
    for module, file in modules.items():
        names = {name.rpartition(".")[0] if name not in modules else name for name in imports(file)}
        left[module] = {name for name in names if name in modules} - {"spmoe", module}
    assert "spmoe.decoding.cached_model" in left["spmoe.decoding.speculative"]
    while leaves := [module for module, used in left.items() if not used & left.keys()]:
        for module in leaves:
            del left[module]
    assert not left, f"circles among {sorted(left)}"


def native_files() -> list[Path]:
    files = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in SOURCES]
    assert len(files) > 100
    return files


def test_every_native_layer_includes_only_what_is_below_it() -> None:
    for file in native_files():
        layer = file.parent.relative_to(ROOT / "csrc").as_posix()
        wrong = set(includes(file)) - MAY_INCLUDE[layer] - {layer}
        assert not wrong, f"{file.relative_to(ROOT)} includes {wrong}"


def test_cuda_and_torch_stay_in_their_folders() -> None:
    for file in native_files():
        text = file.read_text()
        assert "#include <torch" not in text, file
        if file.parent.name != "cuda":
            assert "#include <cuda" not in text, file


def test_every_package_imports_only_what_is_below_it() -> None:
    package = ROOT / "python" / "spmoe"
    for file in package.rglob("*.py"):
        own = file.relative_to(package).with_suffix("").parts[0]
        found = {
            name.removeprefix("spmoe.").split(".")[0]
            for name in imports(file)
            if name.startswith("spmoe.")
        }
        if own in PACKAGES:
            wrong = found - PACKAGES[own] - NEAR - {own}
            assert not wrong, f"{file.relative_to(package)} imports {sorted(wrong)}"
        else:
            assert (package / f"{own}.py").is_file(), f"{own} is in no layer"


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    package = ROOT / "python" / "spmoe"
    for file in package.rglob("*.py"):
        module = str(file.relative_to(package).with_suffix(""))
        if not module.startswith(tuple(MAY_IMPORT[library])):
            wrong = [name for name in imports(file) if f"{name}.".startswith(f"{library}.")]
            assert not wrong, f"{module} imports {wrong}"


def test_pure_modules_import_neither_torch_nor_the_native_module() -> None:
    for module in PURE:
        file = ROOT / "python" / "spmoe" / f"{module}.py"
        assert not [n for n in imports(file) if n.startswith(("torch", "spmoe._core"))], module


def test_the_command_line_uses_only_public_names() -> None:
    for file in (ROOT / "python" / "spmoe" / "cli").glob("*.py"):
        for name in imports(file):
            assert not re.search(r"(^|\.)_[^_]", name), f"{file.stem} imports {name}"
