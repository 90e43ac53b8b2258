"""`spmoe demo`."""

from __future__ import annotations

import json

import click

from spmoe.cli.options import option
from spmoe.cli.progress import progress_bar
from spmoe.demo import VARIANTS


@click.command()
@click.argument("variant", type=click.Choice(VARIANTS), default=VARIANTS[0])
@option("--describe", is_flag=True, help="Say what the pair is and is not; make nothing.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
def demo(variant: str, describe: bool, as_json: bool) -> None:
    """Make the built-in pair ahead of time."""
    with progress_bar(as_json) as progress:
        progress("importing torch and transformers", 0, 1)
        from spmoe.demo.pair import describe as describe_pair
        from spmoe.demo.pair import ensure_pair

        pair = None if describe else ensure_pair(variant, progress=progress)
    if pair is None:
        text = describe_pair(variant)
        click.echo(json.dumps({"variant": variant, "description": text}) if as_json else text)
        return
    paths = {"target": str(pair.target), "draft": str(pair.draft)}
    if as_json:
        click.echo(json.dumps(paths))
    else:
        click.echo("\n".join(f"{role}: {path}" for role, path in paths.items()))
