"""How does spmoe compare with transformers and accelerate's offloading in the same device memory?

Both decode the same prompts greedily with the same checkpoint, in one run on one machine, with and
without a draft. accelerate may use on the device what spmoe does: everything but the experts, and
the expert memory; the rest it keeps in RAM (on the host: on the disk) and moves layer by layer. It
holds experts in the dtype of activations, spmoe in the checkpoint's: give that.

    python bench/python/compare_offload.py MODEL --draft-model DRAFT --dtype bfloat16

Skips with the reason, and exit status 0, where accelerate or the device is missing.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

import spmoe
from spmoe.bench.cell import Tally, run_prompt
from spmoe.cli.options import find_models, pair_options
from spmoe.cli.progress import progress_bar
from spmoe.config import format_bytes, parse_memory
from spmoe.models.checkpoint import find_checkpoint
from spmoe.models.loading import load_draft, load_target
from spmoe.prompts import select_prompts
from spmoe.settings import check_dtype
from spmoe.system.devices import cuda_status, device_model, resolve_device
from spmoe.system.machine import cpu_model, read_memory


@dataclass(slots=True)
class Outcome:
    """The texts of one system, and its time."""

    system: str
    draft_length: int | None  # None: as transformers chooses
    texts: list[list[int]] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)  # of every token but the first iteration's


class Clock(BaseStreamer):
    """Hears of tokens as transformers writes them."""

    def __init__(self) -> None:
        self._heard: list[tuple[float, int]] = []  # when, how many tokens; first the prompt

    def put(self, value: torch.Tensor) -> None:
        """Note when tokens came."""
        self._heard.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        """Nothing is left to be written."""

    def token_s(self) -> list[float]:
        """Return seconds of each token behind those that came with the prompt's pass."""
        seconds = []
        for (before, _), (now, count) in zip(self._heard[1:-1], self._heard[2:], strict=True):
            seconds += [(now - before) / count] * count
        return seconds


@click.command()
@pair_options
@click.option("--device", default="cuda:0", show_default=True, help="cuda:N or host.")
@click.option("--expert-memory", default="25%", show_default=True, help="On the device.")
@click.option("--draft-length", default=4, show_default=True, help="Of spmoe.")
@click.option("--prompts", default="own:0:2", show_default=True, help="As for `spmoe bench`.")
@click.option("--max-new-tokens", "-n", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Every figure.")
def main(**flags: Any) -> None:
    """Decode with both and print a table."""
    if reason := reason_to_skip(flags["device"]):
        click.echo(f"skipped: {reason}")
        return
    target, draft = find_models(**flags)
    flags["dtype"] = dtype = check_dtype(flags["dtype"]) or torch.float32
    dense_bytes, expert_bytes = _sizes(target, dtype, flags["expert_memory"])
    lengths = [0] if draft is None else [0, flags["draft_length"]]
    with progress_bar(quiet=False) as progress:
        ours = []
        for number, length in enumerate(lengths):
            progress("spmoe", number, 2 * len(lengths))
            ours.append(_run_spmoe(target, draft if length else None, expert_bytes, length, flags))
        prompts = ours[0][1]
        theirs = []
        for number, length in enumerate(lengths, len(lengths)):
            progress("transformers and accelerate", number, 2 * len(lengths))
            drafter = draft if length else None
            budget = dense_bytes + expert_bytes
            theirs.append(_run_accelerate(target, drafter, budget, prompts, flags))
        progress("done", 1, 1)
    rows = [_row(outcome, ours[0][0]) for outcome in [*(each for each, _ in ours), *theirs]]
    where = cpu_model() if flags["device"] == "host" else device_model(flags["device"])
    caption = (
        f"{where}, torch {torch.__version__}; {Path(target).name}, "
        f"{str(dtype).removeprefix('torch.')}; on the device {format_bytes(dense_bytes)} of "
        f"everything but experts and {format_bytes(expert_bytes)} for experts; {flags['prompts']}, "
        f"{flags['max_new_tokens']} tokens each"
    )
    click.echo(f"{caption}\n\n{_table(rows)}")
    if flags["json_path"] is not None:
        flags["json_path"].write_text(json.dumps({"caption": caption, "rows": rows}, indent=1))


def reason_to_skip(device: str) -> str | None:
    """Return why there is nothing to compare here, with the cure; None if there is."""
    if importlib.util.find_spec("accelerate") is None:
        return "accelerate is not installed: pip install accelerate"
    if device == "host":
        return None
    count, reason = cuda_status()
    return None if count else f"{device} is not usable: {reason}"


def _sizes(target: str | Path, dtype: torch.dtype, expert_memory: str) -> tuple[int, int]:
    """Return bytes of everything but experts, and of the expert memory."""
    loaded = load_target(target, dtype=dtype)
    dense = sum(parameter.nbytes for parameter in loaded.model.parameters())
    return dense, parse_memory(expert_memory, loaded.store.total_bytes)


def _run_spmoe(
    target: str | Path,
    draft: str | Path | None,
    expert_bytes: int,
    draft_length: int,
    flags: dict[str, Any],
) -> tuple[Outcome, list[list[int]]]:
    """Return what spmoe did, and the prompts as token ids."""
    outcome, tally = Outcome("spmoe, horizon", draft_length), Tally()
    with spmoe.load(
        target,
        draft,
        expert_memory=expert_bytes,
        device=flags["device"],
        draft_length=draft_length,
        dtype=flags["dtype"],
    ) as engine:
        prompts = [engine.encode(prompt.text) for prompt in select_prompts(flags["prompts"])]
        for tokens in prompts:
            outcome.texts.append(run_prompt(engine, tokens, flags["max_new_tokens"], tally))
    outcome.token_s = tally.token_s
    return outcome, prompts


def _run_accelerate(
    target: str | Path,
    draft: str | Path | None,
    budget_bytes: int,
    prompts: Sequence[list[int]],
    flags: dict[str, Any],
) -> Outcome:
    outcome = Outcome("transformers, accelerate", None if draft is not None else 0)
    device = resolve_device(flags["device"])
    drafter = load_draft(draft, device=device) if draft is not None else None
    with _offloaded(target, budget_bytes, flags) as model:
        model.generation_config.eos_token_id = None  # a text ends at its length, as spmoe's here
        for tokens in prompts:
            clock = Clock()
            prompt = torch.tensor([tokens], device=device)
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=flags["max_new_tokens"],
                assistant_model=drafter,
                streamer=clock,
            )
            outcome.texts.append(written[0, len(tokens) :].tolist())
            outcome.token_s += clock.token_s()
    return outcome


@contextmanager
def _offloaded(target: str | Path, budget_bytes: int, flags: dict[str, Any]) -> Iterator[Any]:
    """Yield the model with as much on the device as the budget holds; free it afterwards."""
    places: dict[int | str, int] = {"cpu": budget_bytes}
    on_gpu = flags["device"] != "host"
    if on_gpu:
        index = torch.device(flags["device"]).index or 0
        places = {index: budget_bytes, "cpu": read_memory().usable_bytes or 0}
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        model = load(
            find_checkpoint(target).directory,
            dtype=flags["dtype"],
            device_map="auto",
            max_memory=places,
            offload_folder=folder,
            trust_remote_code=False,
        )
        try:
            yield model.eval()
        finally:
            del model
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()


def _row(outcome: Outcome, reference: Outcome) -> dict[str, Any]:
    return {
        "system": outcome.system,
        "draft_length": outcome.draft_length,
        "tpot_s": statistics.fmean(outcome.token_s),
        "tokens": sum(map(len, outcome.texts)),
        "same_texts": sum(
            text[: len(other)] == other[: len(text)]
            for text, other in zip(outcome.texts, reference.texts, strict=True)
        ),
        "texts": len(outcome.texts),
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| system | drafted | ms/token | texts as spmoe's without a draft |"]
    lines.append("| --- | --- | --- | --- |")
    for row in rows:
        drafted = "as it chooses" if row["draft_length"] is None else row["draft_length"]
        lines.append(
            f"| {row['system']} | {drafted} | {row['tpot_s'] * 1e3:.1f} | "
            f"{row['same_texts']} of {row['texts']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
