"""`spmoe verify`."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from spmoe.cli.failures import Failure, failing_with
from spmoe.cli.options import (
    check_models,
    device_option,
    draft_length_option,
    engine_options,
    find_models,
    option,
    output_options,
    pair_options,
    pinned_option,
    settings_of,
)
from spmoe.cli.progress import progress_bar

_IDENTICAL, _DIFFERENT, _COULD_NOT_RUN = 0, 1, 2


@click.command()
@pair_options
@draft_length_option("4")
@engine_options
@output_options
@device_option
@pinned_option
@option(
    "--prompts",
    verb="verify",
    type=click.IntRange(min=1),
    help="How many of the prompts; all by default.",
)
@option(
    "--prompts-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One prompt a line; the built-in 20 by default.",
)
@option("--max-new-tokens", "-n", type=click.IntRange(min=1), default=64)
def verify(prompts: int | None, prompts_file: Path | None, **flags: Any) -> None:
    """Prove that the output is the target's own, token for token.

    Decodes each prompt by the plain transformers model with everything in memory, by the engine
    without speculation, and by the engine with it.

    Exit status: 0 identical, 1 different, 2 could not run.
    """
    check_models(**flags)
    try:
        with failing_with(_COULD_NOT_RUN):
            outcome = _run(_read_prompts(prompts, prompts_file), flags)
    except (click.ClickException, Failure, BrokenPipeError):
        raise
    except Exception:  # a fault of the program must not pass for a difference
        traceback.print_exc()
        sys.exit(_COULD_NOT_RUN)
    if flags["as_json"]:
        click.echo(json.dumps(outcome.as_dict()))
    else:
        click.echo(
            f"{outcome.identical} of {outcome.total} identical in {outcome.dtype}, "
            f"{outcome.new_tokens} tokens, {outcome.accepted} of {outcome.drafted} drafted "
            f"accepted: {outcome.proved}"
        )
        if outcome.first_difference is not None:
            click.echo(f"first difference: {json.dumps(outcome.as_dict()['first_difference'])}")
    sys.exit(_IDENTICAL if outcome.identical == outcome.total else _DIFFERENT)


def _read_prompts(count: int | None, file: Path | None) -> list[str]:
    from spmoe.prompts import load_prompts, read_prompts

    prompts = load_prompts() if file is None else read_prompts(file)
    if count is not None and count > len(prompts):
        raise click.UsageError(f"{count} prompts asked, but there are {len(prompts)}")
    return [prompt.text for prompt in prompts[:count]]


def _run(texts: list[str], flags: dict[str, Any]) -> Any:
    with progress_bar(flags["quiet"] or flags["as_json"]) as progress:
        progress("importing torch and transformers", 0, 1)
        import spmoe

        target, draft = find_models(progress, **flags)
        return spmoe.verify(
            target,
            draft,
            texts,
            max_new_tokens=flags["max_new_tokens"],
            progress=progress,
            **settings_of(flags),
        )
