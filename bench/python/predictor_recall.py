"""How well are the target's experts predicted, and from which state? By layer and overall.

    python bench/python/predictor_recall.py --demo=8x
    python bench/python/predictor_recall.py --model MODEL --draft-model DRAFT

First the target writes a text after each prompt, a draft proposing. Then both models read these
texts, and each source of predictions stands against what the target's routers chose for the same
token. Counts only, no times, so that the load of the machine does not matter.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import click

import recall
from measure_recall import LAYER_MAP, LastRow, by_token, by_verification
from spmoe.cli.progress import progress_bar
from spmoe.demo import VARIANTS
from spmoe.demo.pair import ensure_pair
from spmoe.models.experts import attach
from spmoe.models.loading import TargetModel, load_draft, load_target, load_tokenizer
from spmoe.models.text import encode
from spmoe.prediction import layer_map
from spmoe.prediction.calibration import tokenize_calibration
from spmoe.prediction.predictor import draft_mismatch
from spmoe.prediction.states import STATES
from spmoe.prompts import select_prompts
from spmoe.reporting.progress import Progress
from spmoe.runtime import Runtime

EASY = "An easy case: the target was made from its draft."
EXCHANGED = (0.25, 0.5, 0.75, 1.0)  # shares of predicted experts, as in bench/results
LAST_ROWS = {
    "nobody": "nobody",
    "draft": "the draft, which reads its last token too",
    "target": "the target's previous layer",
}


@click.command()
@click.option("--demo", type=click.Choice(VARIANTS), help="The built-in pair.")
@click.option("--model", metavar="MODEL", help="Directory or hub id of the target.")
@click.option("--draft-model", metavar="MODEL", help="Directory or hub id of the draft.")
@click.option("--prompts", default="own:0:8", show_default=True, help="As for `spmoe bench`.")
@click.option("--max-new-tokens", "-n", type=click.IntRange(min=2), default=40, show_default=True)
@click.option("--draft-length", type=click.IntRange(1, 31), default=4, show_default=True)
@click.option("--draft-layers", type=click.IntRange(min=1), help="Cut the draft after so many.")
@click.option("--map", "with_map", is_flag=True, help="Fit a layer map for an equal pair too.")
@click.option("--json", "json_path", metavar="F", help="Every count.")
@click.option("--md", "md_path", metavar="F", help="The tables in Markdown.")
def main(
    demo: str | None,
    model: str | None,
    draft_model: str | None,
    json_path: str | None,
    md_path: str | None,
    **settings: Any,
) -> None:
    """Measure recall, precision and calibration of predictions."""
    if (demo is None) == (model is None) or (model is None) != (draft_model is None):
        raise click.UsageError("give either --demo, or --model and --draft-model")
    with progress_bar(quiet=False) as progress:
        if demo is not None:
            pair = ensure_pair(demo, progress=progress)
            model, draft_model = str(pair.target), str(pair.draft)
        result = measure(str(model), str(draft_model), progress=progress, **settings)
    command = shlex.join(["python", *sys.argv])
    note = EASY if demo is not None else ""
    text = "\n\n".join([f"`{command}`", *tables(result, note)]) + "\n"
    print(text)
    if md_path is not None:
        Path(md_path).write_text(text, encoding="utf-8")
    if json_path is not None:
        Path(json_path).write_text(json.dumps({"command": command} | result, indent=1) + "\n")


def measure(
    model: str,
    draft_model: str,
    *,
    prompts: str,
    max_new_tokens: int,
    draft_length: int,
    draft_layers: int | None,
    with_map: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Return counts by verification and by token, and what they were made with."""
    target, draft = load_target(model), load_draft(draft_model)
    if draft_layers is not None:
        _cut(draft, draft_layers)
    tokenizer = load_tokenizer(model)
    texts = [encode(tokenizer, prompt.text) for prompt in select_prompts(prompts)]
    fitted = None
    if with_map or draft_mismatch(target, draft):
        with _everything_resident(target):
            calibration = tokenize_calibration(tokenizer)
            fitted = layer_map.fit(target, draft, calibration, progress=progress)
    by_last_row = {}
    for last_row in get_args(LastRow):
        with _everything_resident(target) as runtime:
            written = by_verification(
                target,
                draft,
                runtime,
                texts,
                max_new_tokens=max_new_tokens,
                draft_length=draft_length,
                last_row=last_row,
                layer_map=fitted if draft_mismatch(target, draft) else None,
                progress=progress,
            )
            by_last_row[last_row] = {
                "layers": _as_dicts(recall.of_verifications(runtime.stats())),
                "calibration": runtime.calibration(),
            }
    with _everything_resident(target):
        tallies = by_token(
            target, draft, written, layer_map=fitted, exchanged=EXCHANGED, progress=progress
        )
    return {
        "experts": target.store.expert_count,
        "k": target.experts_per_token,
        "draft_length": draft_length,
        "prompts": len(texts),
        "new_tokens": sum(len(text.token_ids) - text.first for text in written),
        "by_token": {
            source: {
                "layers": _as_dicts([tally.recall for tally in layers]),
                "calibration": [
                    (bucket.low, bucket.predictions, bucket.used)
                    for bucket in recall.joined_buckets(layers)
                ],
            }
            for source, layers in tallies.items()
        },
        "by_verification": by_last_row,
    }


def _cut(draft: Any, layers: int) -> None:
    """Make the draft one of another depth: worse at drafting, and read through a layer map."""
    del draft.get_decoder().layers[layers:]
    draft.config.get_text_config().num_hidden_layers = layers


def _everything_resident(target: TargetModel) -> Runtime:
    runtime = target.open_runtime(expert_memory="100%")
    attach(target, runtime)
    return runtime


def _as_dicts(layers: Sequence[recall.Recall]) -> dict[str, Any]:
    total = recall.overall(layers).as_dict()
    return {"overall": total, "each": [layer.as_dict() for layer in layers]}


def tables(result: dict[str, Any], note: str) -> Iterator[str]:
    """Yield captions and tables in Markdown; ``note`` stands in every caption."""
    k, experts, drafted = result["k"], result["experts"], result["draft_length"]
    tokens, verifications = result["by_token"], result["by_verification"]
    ours = STATES[0] if STATES[0] in tokens else LAYER_MAP
    yield (
        f"{k} of {experts} experts a token; {result['prompts']} prompts, {result['new_tokens']} "
        f"new tokens. At random, recall at k is {k / experts:.3f}."
    )
    yield f"By token: what the experts of a token are predicted from. {note}".strip()
    yield _table(
        ["predicted from", "recall at k", "at 2k"],
        [
            [source, *_shares(found["layers"]["overall"], ("at_k", "at_2k"))]
            for source, found in tokens.items()
        ],
    )
    yield (
        f"By verification: predictions of {drafted} drafted tokens from {ours}, against all "
        f"experts that {drafted + 1} rows need. The draft has read all but the last row; the "
        f"source that predicts that one is in the first column. {note}"
    ).strip()
    shares = ("at_k", "at_2k", "precision")
    yield _table(
        ["last row", "recall at k", "at 2k", "precision"],
        [
            [LAST_ROWS[last_row], *_shares(found["layers"]["overall"], shares)]
            for last_row, found in verifications.items()
        ],
    )
    yield (
        f"By layer, from {ours}: by token, where precision is recall at k; by verification, with "
        f"nobody predicting the last row; by verification, with the draft reading it too. {note}"
    ).strip()
    columns = (
        (tokens[ours], shares[:2]),
        (verifications["nobody"], shares),
        (verifications["draft"], shares),
    )
    yield _table(
        [
            *("layer", "token: at k", "at 2k"),
            *("verification: at k", "at 2k", "precision"),
            *("last row read: at k", "at 2k", "precision"),
        ],
        [
            [str(layer)]
            + [
                share
                for found, names in columns
                for share in _shares(found["layers"]["each"][layer], names)
            ]
            for layer in range(len(tokens[ours]["layers"]["each"]))
        ],
    )
    yield (
        f"Calibration by token, from {ours}: the router's probability as predicted, and how often "
        f"the expert was used. Probabilities add up to 1 and uses to {k}. {note}"
    ).strip()
    yield _buckets("probability", tokens[ours]["calibration"])
    yield (
        "Calibration by verification: scores summed over the drafted tokens, as `horizon` has them "
        "at the end of the run. Older weights decay: about the last 200 layers that ran count. "
        f"{note}"
    ).strip()
    yield _buckets("score", verifications["nobody"]["calibration"])


def _shares(counts: dict[str, Any], names: Sequence[str]) -> list[str]:
    return ["-" if counts[name] is None else f"{counts[name]:.3f}" for name in names]


def _buckets(what: str, buckets: Sequence[tuple[float, float, float]]) -> str:
    return _table(
        [f"{what} from", "predictions", "used"],
        [
            [f"{low:.3g}", f"{predictions:.0f}", f"{used / predictions:.3f}"]
            for low, predictions, used in buckets
            if predictions >= 0.5
        ],
    )


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
