"""Options that several verbs take, and the models that they name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from spmoe.cli.progress import progress_bar
from spmoe.cli.types import DEVICE, DRAFT_LENGTH, MEMORY, PINNED_MEMORY
from spmoe.demo import VARIANTS
from spmoe.policies import DEFAULT, EVICTIONS, POLICIES
from spmoe.reporting.progress import Progress


def option(
    flag: str, *names: str, verb: str | None = None, **settings: Any
) -> Callable[[Any], Any]:
    """Return a click option with its environment twin: --draft-length is SPMOE_DRAFT_LENGTH.

    Args:
        flag: As on the command line.
        *names: Other flags, and the name of the parameter.
        verb: Set where the flag means something else than in other verbs; the twin is then
            SPMOE_<VERB>_<FLAG>, so that one variable never has two meanings.
        **settings: As for `click.option`.
    """
    parts = ["spmoe", *([verb] if verb else []), flag.removeprefix("--")]
    settings.setdefault("show_default", True)
    twin = "_".join(parts).upper().replace("-", "_")
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
                type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
                default="auto",
                callback=lambda _context, _option, name: None if name == "auto" else name,
                help="Of activations and of all weights but the experts'; auto: float32 on the "
                "host, the checkpoint's own on CUDA.",
            ),
        ]
    ):
        command = decorate(command)
    return command


device_option = option(
    "--device",
    type=DEVICE,
    default="auto",
    help="host, cuda, cuda:<index>; auto: CUDA where it works.",
)
pinned_option = option(
    "--pinned-memory",
    type=PINNED_MEMORY,
    default="auto",
    help="Experts in page-locked RAM: 0, a share, a size; auto: what fits, for CUDA.",
)
link_option = option(
    "--link-gbps",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Pace the link to so many 10^9 bytes a second.",
)


def _log_to_stderr(_context: click.Context, _option: click.Parameter, verbose: bool) -> bool:
    class Echo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            click.echo(self.format(record), err=True)

    log = logging.getLogger("spmoe")
    if verbose and not log.handlers:
        handler = Echo()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    return verbose


verbose_option = option(
    "--verbose",
    "-v",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_log_to_stderr,
    help="Log the main steps to standard error.",
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
        "--draft-length",
        type=DRAFT_LENGTH,
        default=default,
        help="Tokens drafted an iteration: 0 to 31, or auto.",
    )


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add how an engine holds its experts."""
    for decorate in reversed(
        [
            option(
                "--policy",
                type=click.Choice(POLICIES),
                default=DEFAULT,
                help="What is prefetched; see docs/policies.md.",
            ),
            option(
                "--eviction",
                type=click.Choice(("auto", *EVICTIONS)),
                default="auto",
                help="What leaves; auto: as the policy wants.",
            ),
            option(
                "--expert-memory",
                type=MEMORY,
                default="auto",
                help="Memory for experts: auto (what fits), 25% of all, 6GiB, or bytes.",
            ),
        ]
    ):
        command = decorate(command)
    return command


def settings_of(flags: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return those flags that are settings, by the names that `spmoe.load` takes.

    Args:
        flags: Of a verb.
        **changes: Settings in place of theirs.
    """
    from spmoe.settings import LoadSettingNames

    names = LoadSettingNames.__annotations__
    return {name: flags[name] for name in names if name in flags} | changes


def check_models(*, model: str | None, demo: str | None, **_: Any) -> None:
    """Check that the flags name one target."""
    if (model is None) == (demo is None):
        raise click.UsageError("give either MODEL (a directory or hub id) or --demo")


def find_models(
    progress: Progress | None = None,
    *,
    model: str | None,
    demo: str | None,
    draft_model: str | None,
    **_: Any,
) -> tuple[str | Path, str | Path | None]:
    """Return target and draft, making the built-in pair if it is asked for."""
    check_models(model=model, demo=demo)
    if model is not None:
        return model, draft_model
    from spmoe.demo.pair import ensure_pair

    with nullcontext(progress) if progress else progress_bar(quiet=False) as report:
        pair = ensure_pair(str(demo), progress=report)
    return pair.target, draft_model or pair.draft
