"""`spmoe verify`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from spmoe.cli.options import (
    device_option,
    draft_length_option,
    engine_options,
    find_models,
    option,
    output_options,
    pair_options,
    pinned_option,
    progress_bar,
)


@click.command()
@pair_options
@draft_length_option("4")
@engine_options
@output_options
@device_option
@pinned_option
@option("--prompts", type=click.IntRange(min=1), help="How many of the prompts; all by default.")
@option(
    "--prompts-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One prompt a line; the built-in 20 by default.",
)
@option("--max-new-tokens", "-n", type=click.IntRange(min=1), default=64)
def verify(prompts: int | None, prompts_file: Path | None, **flags: Any) -> None:
    """Prove that the output is the target's own, token for token.

    Decodes each prompt by the plain transformers model with everything in memory, by the engine
    without speculation, and by the engine with it. Exits with status 1 on any difference.
    """
    import spmoe
    from spmoe.prompts import load_prompts

    if prompts_file is not None:
        texts = [line for line in prompts_file.read_text().splitlines() if line.strip()]
    else:
        texts = [prompt.text for prompt in load_prompts()]
    if prompts is not None and prompts > len(texts):
        raise click.UsageError(f"{prompts} prompts asked, but there are {len(texts)}")
    quiet = flags["quiet"] or flags["as_json"]
    target, draft = find_models(**flags | {"quiet": quiet})
    with progress_bar(quiet) as progress:
        outcome = spmoe.verify(
            target,
            draft,
            texts[:prompts],
            max_new_tokens=flags["max_new_tokens"],
            draft_length=flags["draft_length"],
            expert_memory=flags["expert_memory"],
            policy=flags["policy"],
            eviction=flags["eviction"],
            dtype=flags["dtype"],
            device=flags["device"],
            pinned_memory=flags["pinned_memory"],
            progress=progress,
        )
    if flags["as_json"]:
        click.echo(json.dumps(outcome.as_dict()))
    else:
        click.echo(
            f"{outcome.identical} of {outcome.total} identical in {outcome.dtype}, "
            f"{outcome.new_tokens} tokens: {outcome.proved}"
        )
        if outcome.first_difference is not None:
            click.echo(f"first difference: {json.dumps(outcome.as_dict()['first_difference'])}")
    sys.exit(0 if outcome.identical == outcome.total else 1)
