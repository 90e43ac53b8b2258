"""How busy time of the link divides: what it moves while fills wait, what is lost at the end.

A stretch is a run of fills that follow one another without a pause. Its first fill begins when it
was submitted; its last one ends when a thread records its completion, while the link has nothing
left to do. Between the first completion and the last, another fill was always waiting. A fill that
was cancelled in flight counts as a whole one here, and by the bytes that it moved in the caption.

    python bench/python/link_share.py --demo=32x --link-gbps 2 --expert-memory 50%
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import spmoe
from spmoe.bench.cell import Tally, run_prompt
from spmoe.cli.options import find_models, link_option, pair_options
from spmoe.prompts import select_prompts
from spmoe.runtime import POLICIES
from spmoe.system.machine import cpu_model

_SPANS = 1 << 20
_PAUSE_S = 20e-6  # shorter is what it takes to note the time
_LONGEST = 6  # stretches of as many fills or more share a row

Fills = list[tuple[float, float]]  # seconds of each submission and completion, by completion


@dataclass
class Share:
    """The sums over stretches of one length."""

    stretches: int = 0
    fills: int = 0
    busy_s: float = 0.0
    between_s: float = 0.0  # from the first completion of each to its last

    def add(self, fills: Fills) -> None:
        """Add one stretch."""
        self.stretches += 1
        self.fills += len(fills)
        self.busy_s += fills[-1][1] - min(start for start, _ in fills)
        self.between_s += fills[-1][1] - fills[0][1]


@click.command()
@pair_options
@link_option
@click.option("--expert-memory", default="50%", show_default=True)
@click.option("--policy", type=click.Choice(POLICIES), default="horizon", show_default=True)
@click.option("--draft-length", default=4, show_default=True)
@click.option("--prompts", default="human-eval:40:42", show_default=True)
@click.option("--max-new-tokens", "-n", default=40, show_default=True)
@click.option("--md", type=click.Path(path_type=Path), help="The table in Markdown.")
def main(**flags: Any) -> None:
    """Print the share of a paced link's rate that it moves, by the length of its stretches."""
    gbps = flags["link_gbps"]
    if not gbps:
        raise click.UsageError("give --link-gbps: the share is of that rate")
    target, draft = find_models(**flags)
    shares: dict[int, Share] = defaultdict(Share)
    total, tally = Share(), Tally()
    with spmoe.load(
        target,
        draft,
        expert_memory=flags["expert_memory"],
        policy=flags["policy"],
        draft_length=flags["draft_length"],
        link_gbps=gbps,
        trace_spans=_SPANS,
    ) as engine:
        for prompt in select_prompts(flags["prompts"]):
            fills = _decode(engine, prompt.text, flags["max_new_tokens"], tally)
            for stretch in _stretches(fills):
                shares[min(len(stretch), _LONGEST)].add(stretch)
                total.add(stretch)
        copy_s = engine.runtime.store.blob_bytes / (gbps * 1e9)
    text = _table(shares, total, copy_s)
    counted = tally.counters.link_bytes / tally.counters.link_busy_s / (gbps * 1e9)
    caption = (
        f"{cpu_model()}; link {gbps:g} GB/s (paced), {copy_s * 1e3:.2f} ms a fill; "
        f"{flags['policy']}, expert memory {flags['expert_memory']}, {flags['draft_length']} "
        f"drafted; share by the counters {counted:.3f}"
    )
    click.echo(f"{caption}\n\n{text}")
    if flags["md"]:
        flags["md"].write_text(f"{caption}\n\n{text}\n")


def _decode(engine: spmoe.Engine, text: str, count: int, tally: Tally) -> Fills:
    """Return the fills of one text behind its prompt; add what it came to."""
    run_prompt(engine, engine.encode(text), count, tally)
    _, prompt = engine.phases[:2]  # not drafted, read
    fills = [
        (start_s, end_s)
        for track, _, _, start_s, end_s, _ in engine.runtime.spans()
        if track in ("demand", "prefetch") and start_s >= prompt.end_s
    ]
    return sorted(fills, key=lambda fill: fill[1])


def _stretches(fills: Fills) -> list[Fills]:
    stretches: list[Fills] = []
    for start, end in fills:
        if stretches and start <= stretches[-1][-1][1] + _PAUSE_S:
            stretches[-1].append((start, end))
        else:
            stretches.append([(start, end)])
    return stretches


def _table(shares: dict[int, Share], total: Share, copy_s: float) -> str:
    lines = [
        "| fills in a stretch | stretches | fills | share of the rate | while others wait "
        "| ms a stretch beyond its copies |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for length, share in sorted(shares.items()):
        lines.append(_row(f"{length}{' or more' if length == _LONGEST else ''}", share, copy_s))
    return "\n".join([*lines, _row("all", total, copy_s)])


def _row(name: str, share: Share, copy_s: float) -> str:
    followed = share.fills - share.stretches
    between = f"{followed * copy_s / share.between_s:.3f}" if followed else "-"
    beyond_s = (share.busy_s - share.fills * copy_s) / share.stretches
    return (
        f"| {name} | {share.stretches} | {share.fills} | {share.fills * copy_s / share.busy_s:.3f} "
        f"| {between} | {beyond_s * 1e3:.2f} |"
    )


if __name__ == "__main__":
    main()
