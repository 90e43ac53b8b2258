"""The package as a program imports it: every public name, and torch only when one is used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spmoe


def run(program: str, **environment: str) -> str:
    """Return the output of a program in an interpreter of its own."""
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_every_public_name_is_there_and_listed() -> None:
    for name in spmoe.__all__:
        assert getattr(spmoe, name) is not None
        assert name in dir(spmoe)
    star: dict[str, object] = {}
    exec("from spmoe import *", star)
    assert star.keys() >= set(spmoe.__all__)


def test_no_module_takes_the_place_of_a_public_name() -> None:
    modules = {file.stem for file in Path(spmoe.__file__).parent.iterdir()}
    assert not modules & set(spmoe.__all__)


def test_modules_are_attributes_and_other_names_are_refused() -> None:
    assert run("import spmoe; print(spmoe.errors.Error is spmoe.Error)").strip() == "True"
    with pytest.raises(AttributeError, match="module 'spmoe' has no attribute 'lode'"):
        _ = spmoe.lode  # type: ignore[attr-defined]
    assert not hasattr(spmoe, "__wrapped__")


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--help"], {}),
        (["--version"], {}),
        (["generate", "--help"], {}),
        (["bench", "--help"], {}),
        ([], {"_SPMOE_COMPLETE": "bash_complete", "COMP_WORDS": "spmoe ge", "COMP_CWORD": "1"}),
    ],
)
def test_help_version_and_completion_do_not_import_torch(
    arguments: list[str], environment: dict[str, str]
) -> None:
    program = f"""
import sys
from spmoe.cli import main
sys.argv = ["spmoe", *{arguments!r}]
try:
    main()
finally:
    print(*(name for name in ("torch", "transformers", "numpy") if name in sys.modules))
"""
    printed = run(program, **environment).splitlines()
    assert len(printed) > 1
    assert printed[-1] == ""


def test_threads_of_torch_are_set_up_before_it_is_imported() -> None:
    program = """
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"])
            raise SystemExit

for name in [name for name in os.environ if name.startswith(("OMP", "KMP", "GOMP"))]:
    del os.environ[name]
sys.meta_path.insert(0, Watch())
import spmoe
spmoe.load
"""
    assert run(program).split() == ["PASSIVE", "5000"]


@pytest.mark.slow
def test_a_type_checker_finds_a_misspelt_argument(tmp_path: Path) -> None:
    file = tmp_path / "misspelt.py"
    file.write_text(
        "import spmoe\n"
        "engine: spmoe.Engine = spmoe.load('model')\n"
        "engine.generate('text', max_new_tokens=3, stop=None, raw=True, draft_length='auto')\n"
        "engine.generate('text', max_new_token=3)\n"
        "engine.stream('text', max_new_token=3)\n"
        "spmoe.load('model', expert_memory='25%', expert_memry=1)\n"
        "spmoe.verify('model', None, [], expert_memory=1, expert_memry=1)\n"
        "target, store = engine.target, engine.runtime.store\n"
        "spmoe.Runtime(store, experts_per_token=2, expert_memory=1, expert_memry=1)\n"
        "target.open_runtime(expert_memory=1, expert_memry=1)\n"
    )
    options = tmp_path / "mypy.ini"  # reading torch takes a minute, and says nothing here
    options.write_text("[mypy-torch.*,transformers.*]\nfollow_imports = skip\n")
    package = Path(spmoe.__file__).parents[1]
    installed = package.name == "site-packages"  # where mypy looks by itself, and wants no path
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", f"--config-file={options}", file],
        env=os.environ | ({} if installed else {"MYPYPATH": str(package)}),
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    pattern = f"^{file}:([0-9]+): error: .*(?:max_new_token|expert_memry)"
    wrong = re.findall(pattern, found, re.MULTILINE)
    assert wrong == ["4", "5", "6", "7", "9", "10"], found
    assert len(re.findall(f"^{file}:[0-9]+: error:", found, re.MULTILINE)) == len(wrong), found
