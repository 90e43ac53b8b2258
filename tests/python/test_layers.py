"""Includes and imports keep to the layers of docs/design.md, read off the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAY_INCLUDE = {
    "base": set(),
    "schedule": {"base"},
    "store": {"base"},
    "device": {"base"},
    "compute": {"base", "device"},
    "runtime": {"base", "schedule", "store", "device", "compute"},
    "bindings": {"base", "runtime", "schedule", "store", "device"},
}
# A library -> the only modules of spmoe that may import it.
MAY_IMPORT = {
    "transformers": {"models/", "pairing", "demo"},
    "spmoe._core": {
        "counters",
        "runtime",
        "policies",
        "devices",
        "models/experts",
        "errors",
        "store",
    },
}
PURE = {
    "acceptance",
    "config",
    "costs",
    "cutoff",
    "draft_length",
    "ema",
    "generation",
    "machine",
    "metrics",
    "planner",
    "prior",
    "turns",
}  # neither torch nor _core


def includes(file: Path) -> list[str]:
    return re.findall(r'^#include "([a-z_]+)/', file.read_text(), re.MULTILINE)


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
    assert "spmoe.cached_model" in left["spmoe.speculative"]
    while leaves := [module for module, used in left.items() if not used & left.keys()]:
        for module in leaves:
            del left[module]
    assert not left, f"circles among {sorted(left)}"


def test_every_native_layer_includes_only_what_is_below_it() -> None:
    files = [file for file in (ROOT / "csrc").glob("*/*") if file.suffix != ".txt"]
    assert {file.parent.name for file in files} <= MAY_INCLUDE.keys()
    for file in files:
        layer = file.parent.name
        wrong = set(includes(file)) - MAY_INCLUDE[layer] - {layer}
        assert not wrong, f"{file.relative_to(ROOT)} includes {wrong}"


def test_cuda_and_torch_stay_in_their_files() -> None:
    for file in (ROOT / "csrc").glob("*/*"):
        text = file.read_text()
        assert "#include <torch" not in text, file
        if not file.name.startswith("cuda_") and file.suffix != ".cu":
            assert "#include <cuda" not in text, file


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
