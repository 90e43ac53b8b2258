"""`spmoe demo`."""

from __future__ import annotations

import json

import click

from spmoe.cli.options import VARIANTS, option
from spmoe.cli.progress import progress_bar


@click.command()
@click.argument("variant", type=click.Choice(VARIANTS), default=VARIANTS[0])
@option("--describe", is_flag=True, help="Say what the pair is and is not; make nothing.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
def demo(variant: str, describe: bool, as_json: bool) -> None:
    """Make the built-in pair ahead of time."""
    from spmoe.demo import describe as describe_pair
    from spmoe.demo import ensure_pair

    if describe:
        text = describe_pair(variant)
        click.echo(json.dumps({"variant": variant, "description": text}) if as_json else text)
        return
    with progress_bar(as_json) as progress:
        pair = ensure_pair(variant, progress=progress)
    paths = {"target": str(pair.target), "draft": str(pair.draft)}
    if as_json:
        click.echo(json.dumps(paths))
    else:
        click.echo("\n".join(f"{role}: {path}" for role, path in paths.items()))
