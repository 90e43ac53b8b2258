"""A model larger than the memory it is given, on real weights, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from spmoe.demo.pair import Pair, ensure_pair

MIB = 1 << 20
# Python, torch, transformers, the tokenizer and the key-value cache; README.md names it.
OVERHEAD_BYTES = 640 * MIB
SHARE = 0.10

CGROUP = Path("/sys/fs/cgroup/memory")  # version 1; where it is not writable, usage is measured


@pytest.fixture(scope="module")
def pair(user_cache: Path) -> Pair:
    return ensure_pair("8x", cache_dir=user_cache)


@pytest.fixture
def confine() -> Iterator[Callable[[int], Callable[[], None] | None]]:
    """Return what a child process calls to live in so many bytes, None if nothing can be had."""
    group = CGROUP / f"spmoe-test-{os.getpid()}"

    def confine(limit_bytes: int) -> Callable[[], None] | None:
        try:
            group.mkdir()
        except OSError:
            return None
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))

        def join() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        return join

    yield confine
    if group.exists():
        group.rmdir()


def sizes(checkpoint: Path) -> tuple[int, int, int]:
    """Bytes of all files, of everything but experts in fp32, and of the experts as they rest."""
    dense = experts = 0
    files = list(checkpoint.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                count = 1
                for extent in tensors.get_slice(name).get_shape():
                    count *= extent
                if ".experts." in name:
                    experts += 2 * count
                else:
                    dense += 4 * count
    return sum(file.stat().st_size for file in files), dense, experts


def test_the_peak_is_this_process_own_and_not_its_parents() -> None:
    ballast = b"x" * (600 * MIB)
    code = "from spmoe.system.machine import peak_rss_bytes; print(peak_rss_bytes())"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, preexec_fn=int
    )
    assert int(child.stdout) < len(ballast)


@pytest.mark.pair
@pytest.mark.xdist_group("8x")
def test_memory_stays_under_dense_part_budget_and_overhead(
    pair: Pair, confine: Callable[[int], Callable[[], None] | None]
) -> None:
    file_bytes, dense_bytes, expert_bytes = sizes(pair.target)
    limit = dense_bytes + int(SHARE * expert_bytes) + OVERHEAD_BYTES
    assert file_bytes > limit, "the model must not fit as a whole"
    command = [
        *(sys.executable, "-m", "spmoe", "generate", pair.target, "--json"),
        *("--prompt", "Name three colours.", "--max-new-tokens", "16"),
        *("--expert-memory", f"{SHARE:.0%}"),
    ]
    child = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=confine(limit)
    )
    assert child.returncode == 0, child.stderr
    figures = json.loads(child.stdout)
    assert figures["new_tokens"] > 1
    assert figures["peak_rss_bytes"] < limit
