"""`spmoe generate`."""

from __future__ import annotations

import json
import sys
from typing import IO, TYPE_CHECKING, Any

import click

from spmoe.cli.failures import failing_with
from spmoe.cli.options import (
    check_models,
    device_option,
    draft_length_option,
    engine_options,
    find_models,
    link_option,
    option,
    output_options,
    pair_options,
    pinned_option,
    settings_of,
)
from spmoe.cli.progress import progress_bar
from spmoe.cli.types import OutputFile, WholeText
from spmoe.prompts import check_text

if TYPE_CHECKING:
    from spmoe.engine import Engine

_TRACE_SPANS = 200_000  # some minutes of decoding


@click.command()
@pair_options
@draft_length_option("auto")
@engine_options
@output_options
@option("--prompt", "-p", help="The user's message.")
@option(
    "--file",
    "-f",
    type=click.File(encoding="utf-8"),
    help="Read the prompt from a file; - is standard input.",
)
@option("--max-new-tokens", "-n", type=click.IntRange(min=1), default=128)
@option("--no-speculation", is_flag=True, help="Decode plainly.")
@option("--raw", is_flag=True, help="The prompt is plain text: no chat template.")
@option(
    "--stop",
    type=WholeText(),
    multiple=True,
    help="End the text at this string; may be given again. The variable holds one string.",
)
@option(
    "--seed",
    type=click.IntRange(-(1 << 63), (1 << 64) - 1),
    default=0,
    help="Of random numbers; greedy decoding draws none.",
)
@option(
    "--max-context",
    type=click.IntRange(min=1),
    help="Tokens of prompt and answer that memory is kept for; by default the model's context, "
    "4096 at most.",
)
@device_option
@pinned_option
@link_option
@option("--trace", type=OutputFile(), help="Write a timeline for ui.perfetto.dev.")
def generate(
    prompt: str | None, file: IO[str] | None, no_speculation: bool, seed: int, **flags: Any
) -> None:
    """Write text after a prompt.

    The text goes to standard output as it is written, a table of what it cost to standard error.
    """
    check_models(**flags)
    text = _read_prompt(prompt, file)
    quiet = flags["quiet"] or flags["as_json"]
    with progress_bar(quiet) as progress:
        progress("importing torch and transformers", 0, 1)
        import torch

        import spmoe

        torch.manual_seed(seed)
        target, draft = find_models(progress, **flags)
        engine = spmoe.load(
            target,
            None if no_speculation else draft,
            progress=progress,
            **settings_of(
                flags,
                draft_length=0 if no_speculation else flags["draft_length"],
                trace_spans=_TRACE_SPANS if flags["trace"] else 0,
            ),
        )
    with engine:
        if not quiet and flags["expert_memory"] == "auto" and engine.memory is not None:
            click.echo(engine.memory.describe(), err=True)
        options = {name: flags[name] for name in ("max_new_tokens", "raw", "stop")}
        if flags["as_json"]:
            result = engine.generate(text, **options)
            figures = {"text": result.text, "token_ids": result.token_ids} | result.stats.as_dict()
            plain = _why_plain(engine, figures, no_speculation)
            more = {"load_seconds": engine.load_seconds, "decoded_plainly": plain}
            click.echo(json.dumps(figures | more))
        else:
            for chunk in engine.stream(text, **options):
                click.echo(chunk, nl=False)
                sys.stdout.flush()
            click.echo()
            if not quiet:
                figures = engine.stats()["request"]
                plain = _why_plain(engine, figures, no_speculation)
                _print_figures(figures, plain, engine.load_seconds, flags["link_gbps"])
        if flags["trace"] is not None:
            from spmoe.reporting.trace import write_trace

            write_trace(flags["trace"], engine.phases, engine.runtime.spans())


def _read_prompt(prompt: str | None, file: IO[str] | None) -> str:
    """Return the prompt from where it is given, checked as far as it can be without a model."""
    if (prompt is None) == (file is None):
        raise click.UsageError("give the prompt with either --prompt or --file")
    try:
        text = prompt if file is None else file.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"the prompt is not UTF-8 text (byte {error.start}: {error.reason}); give a text file"
        ) from error
    if not text:
        raise click.UsageError("the prompt is empty; give at least one character")
    with failing_with(2):
        check_text(text)
    return text


def _why_plain(engine: Engine, figures: dict[str, Any], no_speculation: bool) -> str | None:
    """Return why nothing was drafted; None if something was."""
    if figures["drafted"]:
        return None
    if no_speculation:
        return "decoded plainly: --no-speculation"
    if engine.draft_note:
        return f"decoded plainly: {engine.draft_note}"
    if engine.draft_length == 0:
        return "decoded plainly: draft length 0"
    from spmoe.decoding.planner import PLAIN_FIRST

    if figures["iterations"] <= 1 + PLAIN_FIRST:
        return "decoded plainly: the text ended before a draft was tried"
    link = figures["link_gbps"]
    return "decoded plainly: drafting does not pay on this link" + (
        "" if link is None else f", {link:.1f} GB/s"
    )


def _print_figures(
    figures: dict[str, Any], plain: str | None, load_seconds: dict[str, float], link_gbps: float
) -> None:
    from rich.console import Console
    from rich.table import Table

    from spmoe.config import format_bytes

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    tpot = figures["tpot_s"]
    link, pinned_gbps = figures["link_gbps"], figures["pinned_gbps"]
    rows = {
        "time to load": _load_time(load_seconds),
        "time to first token": f"{figures['ttft_s']:.3f} s",
        "time per output token": "-" if tpot is None else f"{tpot * 1e3:.1f} ms",
        "tokens per second": f"{figures['tokens_per_s']:.1f}",
        "acceptance": plain
        or f"{share(figures['acceptance'])} "
        f"({figures['accepted']} of {figures['drafted']} drafted)",
        "tokens per iteration": f"{figures['tokens_per_iteration']:.2f}",
        "hit rate": share(figures["hit_rate"]),
        "moved per token": format_bytes(figures["bytes_per_token"]),
        "link": ("-" if link is None else f"{link:.2f} GB/s")
        + (f" (paced to {link_gbps} GB/s)" if link_gbps else ""),
        "stall": f"{figures['stall_s']:.3f} s",
        "expert memory": f"{format_bytes(figures['expert_memory_bytes'])} of "
        f"{format_bytes(figures['expert_total_bytes'])}",
        "page-locked experts": format_bytes(figures["pinned_bytes"])
        + (f", filled at {pinned_gbps:.2f} GB/s" if pinned_gbps is not None else ""),
        "device": figures["device"],
        "peak resident memory": format_bytes(figures["peak_rss_bytes"]),
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(stderr=True).print(table)


def _load_time(seconds: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"{sum(seconds.values()):.1f} s ({parts})"
