"""The command line: one verb a job, each flag with an environment twin SPMOE_*."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from spmoe.cli.bench import bench
from spmoe.cli.demo import demo
from spmoe.cli.doctor import doctor
from spmoe.cli.failures import Failure, failing_with
from spmoe.cli.generate import generate
from spmoe.cli.options import verbose_option
from spmoe.cli.profile import profile
from spmoe.cli.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="spmoe")
def cli() -> None:
    """Run Mixture-of-Experts models larger than memory, with speculative decoding.

    Exit status: 0 done; 1 an error; 2 wrong usage; 130 interrupted. See docs/cli.md.
    """


for verb in (generate, verify, profile, bench, demo, doctor):
    cli.add_command(verbose_option(verb))


def main() -> NoReturn:
    """Run the command line; an error becomes one line and an exit status."""
    status = 0
    try:
        with failing_with(1):
            returned = cli(prog_name="spmoe", standalone_mode=False)
            status = returned if isinstance(returned, int) else 0
            sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads the output any more, which Python flushes once again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("aborted", err=True)
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except Failure as failure:
        click.echo(f"error: {failure}", err=True)
        status = failure.status
    sys.exit(status)
