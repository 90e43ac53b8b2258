"""Install spmoe as a user does, into bare environments of several Pythons, and use it there.

Into each environment goes the source tree and then the wheel of the source distribution, both by
pip with its build isolation. Each is imported, asked for its version and, where torch is to be had,
made to write text, all from another folder. A torch that brings gigabytes of CUDA libraries is not
downloaded; then spmoe is installed with its other dependencies, and the report names what was left
out.

Example:
    python tests/install/try_install.py 3.11 3.12 /usr/local/bin/python3.13
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scikit_build_core.build import build_sdist

ROOT = Path(__file__).parents[2]
PIP = ["-m", "pip", "--disable-pip-version-check"]
CHECK = """
import importlib.metadata, pathlib, sys
import spmoe
from spmoe import _core
folder = pathlib.Path(spmoe.__file__).parent
assert folder.is_relative_to(sys.prefix), f"{folder} is not in the environment {sys.prefix}"
assert (folder / "_core.pyi").is_file() and (folder / "py.typed").is_file(), "no type stubs"
print(importlib.metadata.version("spmoe"), _core.cuda_status()[1], sep="\\n")
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Return what a command prints; end with its whole output if it fails."""
    # As from a user's shell: nothing of the environment that this script runs in.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def find_python(wanted: str) -> Path | None:
    """Return an interpreter for ``wanted``, a path or a version, that runs; None without one."""
    version = f"import sys; assert '%d.%d' % sys.version_info[:2] == {wanted!r}"
    if os.sep in wanted:
        candidates, version = [Path(wanted)], "pass"
    else:
        found = shutil.which(f"python{wanted}")
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
        candidates = [Path(found)] if found else []
        candidates += sorted(pyenv.glob(f"versions/{wanted}.*/bin/python"))
    for candidate in candidates:  # pyenv's own `python3.12` is there even where no 3.12 is chosen
        done = subprocess.run([candidate, "-c", version], capture_output=True, check=False)
        if done.returncode == 0:
            return candidate
    return None


def why_no_torch(python: Path) -> str | None:
    """Return why torch is left out of the environment of ``python``; None if it is not."""
    ask = ["install", "--dry-run", "--quiet", "--report", "-", "-c", ROOT / "constraints.txt"]
    try:
        answer = run(python, *PIP, *ask, "torch")
    except RuntimeError as error:
        return str(error).splitlines()[-1]
    names = [
        item["metadata"]["name"] for item in json.loads(answer[answer.index("{") :])["install"]
    ]
    cuda = [name for name in names if name.startswith("nvidia")]
    return f"torch brings {len(cuda)} CUDA libraries, gigabytes" if cuda else None


def dependencies(python: Path) -> list[str]:
    """Return what the spmoe that is installed needs, without torch."""
    ask = "import importlib.metadata as m; print('\\n'.join(m.requires('spmoe')))"
    lines = run(python, "-c", ask).splitlines()
    return [line for line in lines if "extra ==" not in line and not line.startswith("torch")]


def try_source(python: Path, source: Path, checkpoint: Path, missing: str | None) -> str:
    """Install ``source`` with isolation, use it from another folder, and say what was done."""
    start = time.monotonic()
    install = [python, *PIP, "install", "--quiet", "-c", ROOT / "constraints.txt"]
    run(*install, *(["--no-deps"] if missing else []), source)
    seconds = time.monotonic() - start
    if missing:
        run(*install, *dependencies(python))
    with tempfile.TemporaryDirectory() as elsewhere:
        folder = Path(elsewhere)
        version, cuda = run(python, "-c", CHECK, cwd=folder).strip().splitlines()[-2:]
        shown = run(python.with_name("spmoe"), "--version", cwd=folder).strip()
        assert version in shown, f"`spmoe --version` prints {shown!r}, but {version} is installed"
        done = f"installed in {seconds:.0f} s, imported, `spmoe --version`: {shown}"
        if not missing:
            ask = ["generate", checkpoint, "--prompt", "A", "-n", "8", "--json"]
            text = run(python.with_name("spmoe"), *ask, cwd=folder)
            result = json.loads(text[text.index("{") :])
            assert result["token_ids"], f"no token was generated: {result}"
            done += f", {len(result['token_ids'])} tokens generated"
    if shutil.which("nvcc") and os.environ["SKBUILD_CMAKE_DEFINE"] == CUDA_ON:
        assert "without CUDA" not in cuda, f"nvcc is there, but {cuda}"
        done += ", with the CUDA backend"
    return done


# The steps are a user's; only the compiler works less. `make` builds the same wheel as a user does.
SHORT_BUILD = "SPMOE_PCH=ON;CMAKE_CXX_FLAGS_RELEASE=-O0"
CUDA_OFF = f"{SHORT_BUILD};SPMOE_CUDA=OFF"
# `pip install .` compiles the CUDA backend where nvcc is; here only the first does.
CUDA_ON = f"{SHORT_BUILD};CMAKE_CUDA_ARCHITECTURES=90-real;CMAKE_CUDA_FLAGS_RELEASE=-Xcicc -O1"


def main(wanted: list[str]) -> int:
    """Try every interpreter; return 0 if nothing failed and one of them wrote text."""
    own = str(Path(sys.executable).parent)  # with tools that a user's machine may lack
    os.environ["PATH"] = os.pathsep.join(
        folder for folder in os.environ["PATH"].split(os.pathsep) if folder != own
    )
    failed = wrote = False
    with tempfile.TemporaryDirectory() as scratch:
        sys.path.insert(0, str(ROOT / "tests" / "python"))
        from families import make_checkpoint

        checkpoint = make_checkpoint("qwen3_moe", Path(scratch) / "checkpoint")
        os.chdir(ROOT)
        sdist = Path(scratch) / build_sdist(scratch)
        os.environ["SKBUILD_CMAKE_DEFINE"] = CUDA_ON
        # The same sources in other folders are compiled once, where there is ccache.
        os.environ |= {"CCACHE_BASEDIR": "/", "CCACHE_NOHASHDIR": "1"}
        for name in wanted:
            base = find_python(name)
            if base is None:
                print(f"{name}: skipped, no such Python here", flush=True)
                continue
            environment = Path(scratch) / "environment"
            run(base, "-m", "venv", "--clear", environment)
            python = environment / "bin" / "python"
            missing = why_no_torch(python)
            for kind, source in (("tree", ROOT), ("sdist's wheel", sdist)):
                try:
                    done = try_source(python, source, checkpoint, missing)
                except (RuntimeError, AssertionError) as error:
                    failed = True
                    print(f"{name}: {kind}: FAILED: {error}", flush=True)
                    continue
                wrote |= not missing
                left_out = f"; generation skipped: {missing}" if missing else ""
                print(f"{name}: {kind}: {done}{left_out}", flush=True)
                os.environ["SKBUILD_CMAKE_DEFINE"] = CUDA_OFF
                run(python, *PIP, "uninstall", "--quiet", "--yes", "spmoe")
    if not wrote:
        print("FAILED: no environment wrote text", flush=True)
    return 1 if failed or not wrote else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
