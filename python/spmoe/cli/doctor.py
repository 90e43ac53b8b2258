"""`spmoe doctor`."""

from __future__ import annotations

import json

import click

from spmoe.cli.options import option
from spmoe.cli.progress import progress_bar


@click.command()
@option("--no-link", is_flag=True, help="Measure no link: write and read nothing.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
def doctor(no_link: bool, as_json: bool) -> None:
    """Say what this machine has for spmoe, and how to mend what is off.

    Devices and why CUDA cannot be used, the link measured, memory that could be page-locked,
    limits, huge pages, processor features and versions. A value that the machine does not
    give is "unknown".
    """
    with progress_bar(as_json) as progress:
        progress("importing torch", 0, 1)
        from spmoe.doctor import describe, examine

        report = examine(measure=not no_link, progress=progress)
    lines = list(describe(report))
    cures = {line.name: line.cure for line in lines if line.cure}
    if as_json:
        click.echo(json.dumps(report.as_dict() | {"cures": cures}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "found")
    for line in lines:
        table.add_row(line.name, line.value)
    Console().print(table)
    for name, cure in cures.items():
        click.echo(f"{name}: {cure}")
