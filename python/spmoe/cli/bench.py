"""`spmoe bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from spmoe.cli.options import (
    device_option,
    find_models,
    link_option,
    option,
    pair_options,
    progress_bar,
)


@click.command()
@pair_options
@option("--policies", default="all", help="all, or some of them: on-demand,horizon.")
@option("--evictions", default="auto", help="Evictions to combine them with.")
@option("--expert-memory", default="10%,25%,50%", help="Budgets.")
@option("--draft-length", default="4", help="Draft lengths: auto,0,1,4,8.")
@option("--prompts", default="own:0:4", help="own or human-eval, with a slice; or a file.")
@option("--max-new-tokens", "-n", type=click.IntRange(min=2), default=128)
@option("--repeats", type=click.IntRange(min=1), default=3, help="Runs of each cell.")
@device_option
@link_option
@option(
    "--degrade-prediction",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Share of predicted experts to replace by random ones.",
)
@option("--json", is_flag=False, flag_value="-", metavar="[F]", help="JSON, to a file or out.")
@option("--csv", metavar="F", help="Every figure of every row.")
@option("--md", metavar="F", help="The table in Markdown.")
@option("--plot", metavar="F", help="Time per token over expert memory, a picture.")
def bench(**flags: Any) -> None:
    """Measure policies, budgets and draft lengths against each other and against the bound."""
    from spmoe import report
    from spmoe.bench import bench as run_grid
    from spmoe.prompts import select_prompts
    from spmoe.runtime import POLICIES

    quiet = flags["json"] == "-"
    target, draft = find_models(**flags | {"quiet": quiet})
    lengths = [int(text) if text.isdigit() else text for text in _list(flags["draft_length"])]
    with progress_bar(quiet) as progress:
        result = run_grid(
            target,
            draft,
            select_prompts(flags["prompts"]),
            policies=POLICIES if flags["policies"] == "all" else _list(flags["policies"]),
            evictions=_list(flags["evictions"]),
            expert_memory=_list(flags["expert_memory"]),
            draft_lengths=lengths,
            max_new_tokens=flags["max_new_tokens"],
            repeats=flags["repeats"],
            link_gbps=flags["link_gbps"],
            degrade_prediction=flags["degrade_prediction"],
            dtype=flags["dtype"],
            device=flags["device"],
            progress=progress,
        )
    if quiet:
        click.echo(json.dumps(result))
    else:
        table = Table(*report.COLUMNS, title=report.caption(result))
        for row in report.cells(result["rows"]):
            table.add_row(*row)
        Console(width=None if Console().is_terminal else 180).print(table)
    if flags["json"] and not quiet:
        Path(flags["json"]).write_text(json.dumps(result, indent=1))
    if flags["md"]:
        Path(flags["md"]).write_text(report.markdown(result))
    if flags["csv"]:
        report.write_csv(flags["csv"], result)
    if flags["plot"]:
        report.plot(flags["plot"], result)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
