"""Write the type stubs of the native module into the repository, or check that they are current.

Run it after every change of the bindings: `make stubs`. The stubs are committed, so that no build
of the package needs pybind11-stubgen.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

STUBS = Path(__file__).parents[1] / "python" / "spmoe" / "_core.pyi"


def installed_module() -> Path:
    """Return the file of the `_core` that this Python would import.

    Raises:
        FileNotFoundError: spmoe is not installed, or not compiled.
    """
    package = importlib.util.find_spec("spmoe")
    folders = package.submodule_search_locations if package else None
    for file in (file for folder in folders or [] for file in Path(folder).glob("_core*.so")):
        return file
    raise FileNotFoundError("no compiled spmoe for this Python; run `make` first")


def stubs_of(module: Path) -> str:
    """Return the stubs of the extension ``module``, read off the module itself."""
    with tempfile.TemporaryDirectory() as folder:
        # Alone in its folder: beside spmoe's own modules it would find them in place of Python's.
        shutil.copy(module, folder)
        subprocess.run(
            [sys.executable, "-m", "pybind11_stubgen", "_core", "--exit-code", "-o", folder],
            env=os.environ | {"PYTHONPATH": folder},
            check=True,
        )
        text = (Path(folder) / "_core.pyi").read_text()
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


if __name__ == "__main__":
    STUBS.write_text(stubs_of(installed_module()))
