"""Write texts for a while, in every way there is, and compare each with `model.generate`.

Families, drafts, policies, evictions, budgets and draft lengths are drawn at random; copies are
delayed and fail, streams are abandoned. Afterwards the process holds no more memory, files and
threads than before.

Example:
    python tests/python/soak.py --seconds 3600 --seed 7
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import secrets
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from transformers.utils import logging

import spmoe
from families import FAMILIES, make_checkpoint, make_dense_draft
from planted_faults import planted_faults
from spmoe import _core
from spmoe.models.loading import load_plain
from spmoe.policies import EVICTIONS, POLICIES

_FAMILY_COUNT = 4  # of checkpoints at a time
_REQUESTS = 6  # of each engine
_PROMPTS = 4  # of each checkpoint
_NEW_TOKENS = 40
_GROWTH_MIB = 64  # that an allocator may keep


class Model:
    """A checkpoint, and what transformers writes after some prompts."""

    def __init__(self, family: str, path: Path, draw: random.Random) -> None:
        self.family = family
        self.path = make_checkpoint(family, path, seed=draw.randrange(1 << 30))
        plain = load_plain(self.path)
        self.texts: list[tuple[list[int], list[int]]] = []
        for _ in range(_PROMPTS):
            prompt = [draw.randrange(256) for _ in range(draw.randint(1, 90))]
            text = plain.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=_NEW_TOKENS
            )
            self.texts.append((prompt, text[0, len(prompt) :].tolist()))


class Soak:
    """Draws requests, runs them, and counts what came of them."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.draw = random.Random(seed)
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.draft = make_dense_draft(folder / "draft")

    def models(self) -> list[Model]:
        """Return new checkpoints of some families, in place of the last ones."""
        names = self.draw.sample(sorted(FAMILIES), _FAMILY_COUNT)
        return [Model(name, self.folder / name, self.draw) for name in names]

    def run(self, model: Model) -> None:
        """Load an engine with drawn settings and send it some requests."""
        draw = self.draw
        settings = {
            "policy": draw.choice(POLICIES),
            "eviction": draw.choice(("auto", *EVICTIONS)),
            "expert_memory": draw.choice(("50%", "75%", "100%")),
            "draft_length": draw.choice(("auto", 0, 1, 2, 4, 8, 16, 31)),
            "link_gbps": draw.choice((0.0, 0.0, 0.05)),
        }
        draft = draw.choice((None, self.draft, model.path))
        what = f"{model.family}, draft {draft and draft.name}, {settings}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that something optional is turned off
            with planted_faults() as faults, spmoe.load(model.path, draft, **settings) as engine:
                self.counts["engines"] += 1
                for _ in range(_REQUESTS):
                    self.request(engine, faults, model, what)

    def request(
        self, engine: spmoe.Engine, faults: _core.FaultPlan, model: Model, what: str
    ) -> None:
        """Send one request, perhaps with a fault, and compare its text."""
        draw = self.draw
        prompt, expected = draw.choice(model.texts)
        count = draw.randint(1, _NEW_TOKENS)
        faults.plant(
            fail_at_chunk=draw.choice((0, 0, 0, draw.randint(1, 60))),
            delay_seed=draw.randrange(1 << 30),
            max_delay_us=draw.choice((0, 0, 300)),
        )
        length = draw.choice((None, None, draw.randint(0, 31)))
        try:
            if draw.random() < 0.25:
                stream = engine.stream(prompt, max_new_tokens=count, draft_length=length)
                for _ in zip(range(draw.randint(1, 5)), stream, strict=False):
                    pass
                stream.close()
                self.counts["abandoned"] += 1
            found = engine.generate(prompt, max_new_tokens=count, draft_length=length).token_ids
        except spmoe.DeviceError:
            self.counts["failed by an injected fault"] += 1
            faults.plant()
            found = engine.generate(prompt, max_new_tokens=count, draft_length=length).token_ids
        faults.plant()
        self.counts["texts"] += 1
        self.counts["tokens"] += len(found)
        if found != expected[:count]:
            self.counts["different"] += 1
            print(
                f"DIFFERENT: {what}, length {length}, prompt {prompt}: {found} instead of "
                f"{expected[:count]}",
                flush=True,
            )


def held() -> dict[str, int]:
    """Return what this process holds: memory in MiB, open files, threads."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "MiB": int(status["VmRSS"].split()[0]) >> 10,
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def soak(seconds: float, seed: int) -> bool:
    """Run for ``seconds`` at least; return whether nothing was wrong."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    print(f"soak with --seed {seed}, {seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        one = Soak(seed, Path(folder))
        start = time.monotonic()
        before: dict[str, int] = {}
        round_ = 0
        while time.monotonic() < start + seconds or round_ < 2:
            for model in one.models():
                for _ in range(2):
                    one.run(model)
            round_ += 1
            if not before and time.monotonic() > start + seconds / 3:
                before = held()  # once all that is made on first use is there
        after = held()
    growth = {name: after[name] - before[name] for name in after}
    print(", ".join(f"{count} {name}" for name, count in one.counts.items()))
    print(f"held a third of the way: {before}; at the end: {after}")
    grew = growth["MiB"] > _GROWTH_MIB or growth["files"] > 0 or growth["threads"] > 0
    if grew:
        print(f"GREW by {growth}")
    wrong = grew or one.counts["different"] > 0 or one.counts["texts"] == 0
    print("soak: " + ("FAILED" if wrong else "all texts are those of generate, nothing grew"))
    return not wrong


def main() -> int:
    """Parse the arguments and soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    return 0 if soak(options.seconds, seed) else 1


if __name__ == "__main__":
    sys.exit(main())
