"""The committed type stubs are those of the module that was built."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "make_stubs.py"


def test_the_stubs_in_the_repository_are_current() -> None:
    pytest.importorskip("pybind11_stubgen", reason="pybind11-stubgen writes the stubs")
    spec = importlib.util.spec_from_file_location("make_stubs", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.STUBS.read_text() == tool.stubs_of(tool.installed_module()), (
        "the bindings changed: run `make stubs` and commit python/spmoe/_core.pyi"
    )
