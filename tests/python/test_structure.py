"""tools/measure_structure.py counts what it says, on a small tree."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "measure_structure.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_structure", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_figure_of_a_small_tree(tool: ModuleType, tmp_path: Path) -> None:
    files = {
        "csrc/schedule/scheduler.hpp": (
            "class Scheduler {\n public:\n  Scheduler(int x);\n"
            "  [[nodiscard]] int size() const;  ///< of all (that is)\n"
            "  void add(int x);\n  void add(float x);\n"
            " private:\n  void hide();\n  std::mutex mutex_;\n"
            "  TransferQueue queue_;\n  std::vector<std::thread> threads_;\n};\n"
        ),
        "python/spmoe/__init__.py": "",
        "python/spmoe/runtime.py": (
            "from spmoe import planner\nclass Runtime:\n    def close(self): ...\n"
            "    def _hide(self): ...\npinned_memory = 'pinned_memory'\n"
        ),
        "python/spmoe/planner.py": 'import spmoe.runtime\nname = "sp-moe"\n',
        "python/spmoe/policies.py": 'name = "horizon"\n',
        "python/spmoe/long.py": "\n" * 251,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert tool.measure(tmp_path) == {
        "lines in csrc/schedule": 12,
        "lines in python/spmoe": 259,
        "lines of product code": 271,
        "product files over 250 lines": 1,
        "lines of adaptive code": 2,
        "public methods of Scheduler (C++)": 2,
        "public methods of Runtime (C++)": 0,
        "public methods of Runtime (Python)": 1,
        "containers of a fill": 1,
        "mutexes on the way of a fill": 1,
        "thread hops of a completion": 1,
        "imports between Python modules": 2,
        "imports between Python packages": 2,
        "import cycles": 1,
        "mentions of pinned_memory in Python": 2,
        "policy names in strings outside policies.*": 1,
    }
