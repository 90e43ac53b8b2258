"""Policies: what they say of themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from spmoe.policies import EVICTIONS, POLICIES, instead, traits_of

ROOT = Path(__file__).parents[2]
NAMES = re.compile(rf"(?<![\w-])({'|'.join((*POLICIES, *EVICTIONS))})(?![\w-])")
PROMPT = [79, 110, 99, 101, 32, 117, 112, 111, 110]
NEW_TOKENS = 12


def strings_of_python(text: str) -> Iterator[str]:
    """String literals that are no docstrings."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if text and id(node) not in docstrings:
            yield node.value


def strings_of_cpp(text: str) -> list[str]:
    code = re.sub(r"//.*|#include .*", "", text)
    return re.findall(r'"((?:[^"\\\n]|\\.)*)"', code)


class TestTheTable:
    def test_no_code_goes_by_the_name_of_a_policy(self) -> None:
        found = []
        for file in [*ROOT.glob("csrc/**/*.[ch]*"), *ROOT.glob("python/spmoe/**/*.py")]:
            if file.stem == "policies":  # where the rows and the defaults are
                continue
            python = file.suffix == ".py"
            strings = (strings_of_python if python else strings_of_cpp)(file.read_text())
            found += [f"{file.relative_to(ROOT)}: {text}" for text in strings if NAMES.search(text)]
        assert not found

    def test_names_in_code_would_be_found(self) -> None:
        python = '"""Of "oracle"."""\nif policy == "sp-moe" or f"{x} lru":\n    pass  # "belady"'
        assert len([text for text in strings_of_python(python) if NAMES.search(text)]) == 2
        cpp = '#include "schedule/oracle.hpp"  // "lfu"\nif (name == "horizon") return "sp-moe-2";'
        assert [text for text in strings_of_cpp(cpp) if NAMES.search(text)] == ["horizon"]

    def test_docs_list_every_policy_with_its_own_eviction(self) -> None:
        text = (ROOT / "docs" / "policies.md").read_text()
        for name in POLICIES:
            row = re.search(rf"^\| `{name}` .*\| `([a-z-]+)` \|$", text, re.MULTILINE)
            assert row is not None, name
            assert row[1] == traits_of(name).eviction
        for name in EVICTIONS:
            assert f"\n| `{name}` |" in text

    def test_evictions_of_a_row_are_there(self) -> None:
        for name in POLICIES:
            traits = traits_of(name)
            assert {traits.eviction, traits.default_eviction} <= set(EVICTIONS)

    def test_a_message_names_policies_that_do_without_states(self) -> None:
        assert 'policy="next-gate"' in instead("draft")
        assert "horizon" not in instead("draft")
        assert "next-gate" not in instead("draft", "target")
        assert "oracle" not in instead("draft")
