"""`spmoe profile`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from spmoe.cli.options import (
    check_models,
    device_option,
    find_models,
    link_option,
    option,
    output_options,
    pair_options,
    pinned_option,
    settings_of,
)
from spmoe.cli.progress import progress_bar
from spmoe.cli.types import MEMORY
from spmoe.config import format_count

if TYPE_CHECKING:
    from spmoe.costs.profile import Profile


@click.command()
@pair_options
@device_option
@pinned_option
@link_option
@output_options
@option(
    "--expert-memory",
    type=MEMORY,
    default="50%",
    help="Memory to measure in; more is truer: a layer's experts should be resident.",
)
@option(
    "--repeats", verb="profile", type=click.IntRange(min=2), default=7, help="Rounds of samples."
)
def profile(**flags: Any) -> None:
    """Measure what this machine needs for a pair, and keep it for `generate` and `bench`.

    Seconds of a draft step, of a target layer, of experts on the link, and what copies take from
    compute. Kept in the cache folder until machine, pair or settings change.
    """
    check_models(**flags)
    quiet = flags["quiet"] or flags["as_json"]
    with progress_bar(quiet) as progress:
        progress("importing torch and transformers", 0, 1)
        from spmoe.costs.measure import make_profile
        from spmoe.settings import Settings

        target, draft = find_models(progress, **flags)
        made = make_profile(
            target,
            draft,
            Settings(**settings_of(flags)),
            repeats=flags["repeats"],
            progress=progress,
        )
    path = made.save()
    if flags["as_json"]:
        click.echo(json.dumps(made.as_dict() | {"path": str(path)}))
    elif not quiet:
        _print(made)
        click.echo(f"kept in {path}")


def _print(made: Profile) -> None:
    from rich.console import Console
    from rich.table import Table

    costs, spread = made.costs, made.spread
    table = Table("cost", "median", "spread", title="spread: interquartile range over the median")

    def add(name: str, seconds: float, key: str, more: str = "") -> None:
        share = f"{spread[key]:.0%}" if key in spread else "-"
        table.add_row(name, f"{seconds * 1e3:.2f} ms{more}", share)

    if costs.draft_s:
        add("draft step", costs.draft_s, "draft_s")
        add("further token of a draft's pass", costs.draft_token_s, "draft_token_s")
    for rows, seconds in sorted(costs.layer_s.items()):
        add(f"target layer, {format_count(rows, 'row')}", seconds, f"layer_s[{rows}]")
    for batch, seconds in sorted(costs.copy_s.items()):
        gbps = batch * costs.expert_bytes / seconds / 1e9 if seconds else 0.0
        add(
            f"link, {format_count(batch, 'expert')}",
            seconds,
            f"copy_s[{batch}]",
            f" ({gbps:.2f} GB/s)",
        )
    add("compute lost to a prefetch", costs.prefetch_s, "prefetch_s")
    Console().print(table)
