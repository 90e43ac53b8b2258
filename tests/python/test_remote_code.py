"""Code that a model's folder brings is neither run nor asked about."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from families import make_checkpoint
from spmoe.errors import CheckpointError
from spmoe.models.loading import load_draft, load_plain, load_target, load_tokenizer

ROOT = Path(__file__).parents[2]


class Untouched:
    """A standard input that nobody may read."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"sys.stdin.{name} was used")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with code beside it, which leaves a file "ran"."""
    monkeypatch.setattr(sys, "stdin", Untouched())
    path = make_checkpoint("qwen3_moe", tmp_path / "model")
    code = f"open({str(path / 'ran')!r}, 'w')\nclass Own: pass\nclass OwnFast: pass\n"
    (path / "own.py").write_text(code)
    return path


def add(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("load", [load_target, load_draft, load_plain])
def test_a_model_type_that_only_the_folder_knows_is_refused(
    folder: Path, load: Callable[[Path], object]
) -> None:
    add(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(CheckpointError, match=r'model type "own".*never runs.*upgrade transf'):
        load(folder)
    assert not (folder / "ran").exists()


def test_a_model_type_that_transformers_knows_needs_no_code(folder: Path) -> None:
    code = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    add(folder / "config.json", auto_map=code)
    assert load_target(folder).store.layer_count == 3
    load_draft(folder)
    assert not (folder / "ran").exists()


def test_a_tokenizer_that_only_the_folder_knows_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    code = {"AutoTokenizer": ["own.Own", "own.OwnFast"]}
    add(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=code)
    add(folder / "config.json", model_type="own")
    with pytest.raises(CheckpointError, match=r'tokenizer of .* is a "Own".*never runs that'):
        load_tokenizer(folder)
    assert not (folder / "ran").exists()


def test_no_call_leaves_the_question_to_transformers() -> None:
    sources = [*ROOT.glob("python/spmoe/**/*.py"), *ROOT.glob("bench/python/*.py")]
    calls = [
        (node, f"{source.relative_to(ROOT)}:{node.lineno}")
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    asking = [
        (call, place)
        for call, place in calls
        if re.fullmatch(r"_?Auto\w+\.from_(pretrained|config)", ast.unparse(call.func))
    ]
    assert len(asking) >= 3
    for call, place in asking:
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert given.get("trust_remote_code") == "False", place
