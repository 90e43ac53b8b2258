"""The command line: one verb a job, each flag with an environment twin SPMOE_*."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from spmoe.cli.bench import bench
from spmoe.cli.demo import demo
from spmoe.cli.doctor import doctor
from spmoe.cli.generate import generate
from spmoe.cli.profile import profile
from spmoe.cli.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="spmoe")
def cli() -> None:
    """Run Mixture-of-Experts models larger than memory, with speculative decoding."""


for verb in (generate, verify, profile, bench, demo, doctor):
    cli.add_command(verb)


def main() -> NoReturn:
    """Run the command line; errors of spmoe become one line and exit status 1."""
    from spmoe.errors import Error

    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("aborted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Error as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    sys.exit(0)
