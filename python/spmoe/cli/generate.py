"""`spmoe generate`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from spmoe.cli.options import (
    device_option,
    draft_length_option,
    engine_options,
    find_models,
    link_option,
    option,
    output_options,
    pair_options,
    pinned_option,
    progress_bar,
)

_TRACE_SPANS = 200_000  # some minutes of decoding


@click.command()
@pair_options
@draft_length_option("auto")
@engine_options
@output_options
@option("--prompt", "-p", help="The user's message.")
@option("--file", "-f", type=click.File(), help="Read the prompt from a file; - is standard input.")
@option("--max-new-tokens", "-n", type=click.IntRange(min=1), default=128)
@option("--no-speculation", is_flag=True, help="Decode plainly.")
@option("--raw", is_flag=True, help="The prompt is plain text: no chat template.")
@option("--stop", multiple=True, help="End the text at this string; may be given again.")
@option("--seed", type=int, default=0, help="Of random numbers; greedy decoding draws none.")
@device_option
@pinned_option
@link_option
@option("--trace", type=click.Path(dir_okay=False), help="Write a timeline for ui.perfetto.dev.")
def generate(prompt: str | None, file: Any, no_speculation: bool, seed: int, **flags: Any) -> None:
    """Write text after a prompt.

    The text goes to standard output as it is written, a table of what it cost to standard error.
    """
    import torch

    import spmoe

    torch.manual_seed(seed)
    if (prompt is None) == (file is None):
        raise click.UsageError("give the prompt with either --prompt or --file")
    text = prompt if prompt is not None else file.read()
    quiet = flags["quiet"] or flags["as_json"]
    target, draft = find_models(**flags | {"quiet": quiet})
    with (
        progress_bar(quiet) as progress,
        spmoe.load(
            target,
            None if no_speculation else draft,
            expert_memory=flags["expert_memory"],
            draft_length=0 if no_speculation else flags["draft_length"],
            dtype=flags["dtype"],
            policy=flags["policy"],
            eviction=flags["eviction"],
            device=flags["device"],
            pinned_memory=flags["pinned_memory"],
            link_gbps=flags["link_gbps"],
            trace_spans=_TRACE_SPANS if flags["trace"] else 0,
            progress=progress,
        ) as engine,
    ):
        options = {name: flags[name] for name in ("max_new_tokens", "raw", "stop")}
        if flags["as_json"]:
            result = engine.generate(text, **options)
            figures = {"text": result.text, "token_ids": result.token_ids} | result.stats.as_dict()
            click.echo(json.dumps(figures))
            _write_trace(engine, flags["trace"])
            return
        for piece in engine.stream(text, **options):
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo()
        if not quiet:
            _print_figures(engine.stats()["request"], flags["link_gbps"])
        _write_trace(engine, flags["trace"])


def _write_trace(engine: Any, path: str | None) -> None:
    if path is not None:
        from spmoe.trace import write_trace

        write_trace(path, engine.phases, engine.runtime.spans())


def _print_figures(figures: dict[str, Any], link_gbps: float) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    mib = 1 << 20
    tpot = figures["tpot_s"]
    link, pinned_gbps = figures["link_gbps"], figures["pinned_gbps"]
    rows = {
        "time to first token": f"{figures['ttft_s']:.3f} s",
        "time per output token": "-" if tpot is None else f"{tpot * 1e3:.1f} ms",
        "tokens per second": f"{figures['tokens_per_s']:.1f}",
        "acceptance": f"{share(figures['acceptance'])} "
        f"({figures['accepted']} of {figures['drafted']} drafted)",
        "tokens per iteration": f"{figures['tokens_per_iteration']:.2f}",
        "hit rate": share(figures["hit_rate"]),
        "moved per token": f"{figures['bytes_per_token'] / mib:.1f} MiB",
        "link": ("-" if link is None else f"{link:.2f} GB/s")
        + (f" (paced to {link_gbps} GB/s)" if link_gbps else ""),
        "stall": f"{figures['stall_s']:.3f} s",
        "expert memory": f"{figures['expert_memory_bytes'] / mib:.0f} MiB of "
        f"{figures['expert_total_bytes'] / mib:.0f} MiB",
        "page-locked experts": f"{figures['pinned_bytes'] / mib:.0f} MiB"
        + (f", filled at {pinned_gbps:.2f} GB/s" if pinned_gbps is not None else ""),
        "device": figures["device"],
        "peak resident memory": f"{figures['peak_rss_bytes'] / mib:.0f} MiB",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(stderr=True).print(table)
