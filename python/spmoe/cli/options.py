"""What several verbs take: options, models, progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

VARIANTS = ("8x", "32x")


def option(flag: str, *names: str, **settings: Any) -> Callable[[Any], Any]:
    """Return a click option with its environment twin: --draft-length is SPMOE_DRAFT_LENGTH."""
    twin = "SPMOE_" + flag.removeprefix("--").upper().replace("-", "_")
    settings.setdefault("show_default", True)
    return click.option(flag, *names, envvar=twin, show_envvar=True, **settings)


def pair_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every verb takes that loads a target and a draft."""
    for decorate in reversed(
        [
            click.argument("model", required=False),
            option(
                "--demo",
                is_flag=False,
                flag_value=VARIANTS[0],
                type=click.Choice(VARIANTS),
                help="Use the built-in pair in place of MODEL: --demo or --demo=32x.",
            ),
            option("--draft-model", metavar="MODEL", help="Directory or hub id of the draft."),
            option(
                "--dtype",
                type=click.Choice(["float32", "bfloat16", "float16"]),
                default="float32",
                help="Of activations and of all weights but the experts'.",
            ),
        ]
    ):
        command = decorate(command)
    return command


device_option = option(
    "--device",
    default="auto",
    help="host, cuda, cuda:<index>; auto: CUDA where it works.",
)
pinned_option = option(
    "--pinned-memory",
    default="auto",
    help="Experts in page-locked RAM: 0, a share, a size; auto: what fits, for CUDA.",
)
link_option = option(
    "--link-gbps",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Pace the link to so many 10^9 bytes a second.",
)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add how a verb reports."""
    for decorate in (
        option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else."),
        option("--quiet", is_flag=True, help="No progress bars, no table."),
    ):
        command = decorate(command)
    return command


def draft_length_option(default: str) -> Callable[[Any], Any]:
    """Return how far to draft."""
    return option(
        "--draft-length", default=default, help="Tokens drafted an iteration: 0 to 31, or auto."
    )


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add how an engine holds its experts."""
    for decorate in reversed(
        [
            option("--policy", default="horizon", help="What is prefetched; see docs/policies.md."),
            option("--eviction", default="auto", help="What leaves; auto: as the policy wants."),
            option(
                "--expert-memory",
                default="25%",
                help="Memory for experts: 25% of all, 6GiB, or bytes.",
            ),
        ]
    ):
        command = decorate(command)
    return command


def find_models(
    *, model: str | None, demo: str | None, draft_model: str | None, quiet: bool, **_: Any
) -> tuple[str | Path, str | Path | None]:
    """Return target and draft, making the built-in pair if it is asked for."""
    if model is not None and demo is None:
        return model, draft_model
    if demo is None or model is not None:
        raise click.UsageError("give either MODEL (a directory or hub id) or --demo")
    from spmoe.demo import ensure_pair

    with progress_bar(quiet) as progress:
        pair = ensure_pair(demo, progress=progress)
    return pair.target, draft_model or pair.draft


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (description, done, total) that draws a bar on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as bars:
        task = bars.add_task("", total=None)

        def report(description: str, done: int, total: int) -> None:
            bars.update(task, description=description, completed=done, total=total)
            if done >= total:
                bars.stop()
            elif not bars.live.is_started:
                bars.start()

        yield report
