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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """Return what a command prints; end with its whole output if it fails."""
    # As from a user's shell: nothing of the environment that this script runs in.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"PYTHONWARNINGS": "ignore"} | variables,
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


def try_source(
    python: Path, source: Path, checkpoint: Path, missing: str | None, options: str
) -> str:
    """Install ``source`` with isolation, use it from another folder, and say what was done."""
    start = time.monotonic()
    # Modules are compiled when they are imported: most of those that torch brings never are.
    install = [python, *PIP, "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt"]
    no_deps = ["--no-deps"] if missing else []
    run(*install, *no_deps, source, SKBUILD_CMAKE_DEFINE=options)
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
    if shutil.which("nvcc") and options == CUDA_ON:
        assert "without CUDA" not in cuda, f"nvcc is there, but {cuda}"
        done += ", with the CUDA backend"
    return done


# The steps are a user's; only the compiler works less. `make` builds the same wheel as a user does.
SHORT_BUILD = "SPMOE_PCH=ON;CMAKE_CXX_FLAGS_RELEASE=-O0"
CUDA_OFF = f"{SHORT_BUILD};SPMOE_CUDA=OFF"
# `pip install .` compiles the CUDA backend where nvcc is; here only the first does.
CUDA_ON = f"{SHORT_BUILD};CMAKE_CUDA_ARCHITECTURES=90-real;CMAKE_CUDA_FLAGS_RELEASE=-Xcicc -O1"


def try_python(
    name: str,
    base: Path,
    environment: Path,
    *,
    sources: dict[str, Path],
    checkpoint: Path,
    cuda: bool,
) -> tuple[bool, bool]:
    """Try every source with one interpreter; return whether all passed and whether text came."""
    run(base, "-m", "venv", environment)
    python = environment / "bin" / "python"
    missing = why_no_torch(python)
    left_out = f"; generation skipped: {missing}" if missing else ""
    passed = True
    for kind, source in sources.items():
        try:
            options = CUDA_ON if cuda else CUDA_OFF
            done = try_source(python, source, checkpoint, missing, options)
        except (RuntimeError, AssertionError) as error:
            passed = False
            print(f"{name}: {kind}: FAILED: {error}", flush=True)
            continue
        print(f"{name}: {kind}: {done}{left_out}", flush=True)
        cuda = False
        run(python, *PIP, "uninstall", "--quiet", "--yes", "spmoe")
    return passed, passed and not missing


def main(wanted: Sequence[str]) -> int:
    """Try every interpreter; return 0 if nothing failed and one of them wrote text."""
    own = str(Path(sys.executable).parent)  # with tools that a user's machine may lack
    os.environ["PATH"] = os.pathsep.join(
        folder for folder in os.environ["PATH"].split(os.pathsep) if folder != own
    )
    # The same sources in other folders are compiled once, where there is ccache.
    os.environ |= {"CCACHE_BASEDIR": "/", "CCACHE_NOHASHDIR": "1"}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as side_by_side:
        scratch = Path(folder)
        sys.path.insert(0, str(ROOT / "tests" / "python"))
        from families import make_checkpoint

        checkpoint = make_checkpoint("qwen3_moe", scratch / "checkpoint")
        os.chdir(ROOT)
        sources = {"tree": ROOT, "sdist's wheel": scratch / build_sdist(folder)}
        tries = []
        for name in wanted:
            base = find_python(name)
            if base is None:
                print(f"{name}: skipped, no such Python here", flush=True)
                continue
            environment = scratch / f"environment-{len(tries)}"
            tries.append(
                side_by_side.submit(
                    try_python,
                    name,
                    base,
                    environment,
                    sources=sources,
                    checkpoint=checkpoint,
                    cuda=not tries,
                )
            )
        results = [one.result() for one in tries]
    if not any(wrote for _, wrote in results):
        print("FAILED: no environment wrote text", flush=True)
        return 1
    return 0 if all(passed for passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
