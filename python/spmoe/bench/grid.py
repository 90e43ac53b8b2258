"""`spmoe bench`: policies, budgets and draft lengths against each other and against the bound.

Every cell of the grid runs with a cold cache, prompt by prompt; cells take turns, so that drift of
the machine hits all alike. The target alone runs first: its tokens are what every cell must write.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import torch

from spmoe.bench.bounds import (
    Routing,
    add_bounds,
    link_peak_gbps,
    record_routing,
    run_resident,
)
from spmoe.bench.cell import Cell, Tally, load_models, open_engine, run_prompt, to_row
from spmoe.bench.degrade import degrade
from spmoe.errors import InvalidArgument
from spmoe.models.loading import load_plain
from spmoe.models.reference import generate_alone
from spmoe.policies import BASELINE, POLICIES, traits_of
from spmoe.prompts import Prompt
from spmoe.reporting.progress import Progress, silent
from spmoe.settings import Settings
from spmoe.system.devices import device_model
from spmoe.system.machine import cpu_model


def bench(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None,
    prompts: Sequence[Prompt],
    *,
    policies: Sequence[str] = POLICIES,
    evictions: Sequence[str] = ("auto",),
    expert_memory: Sequence[int | str] = ("10%", "25%", "50%"),
    draft_lengths: Sequence[int | str] = (4,),
    max_new_tokens: int = 128,
    repeats: int = 3,
    link_gbps: float = 0.0,
    device: str = "auto",
    degrade_prediction: float = 0.0,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the grid and return ``machine``, ``link_peak_gbps``, ``paced`` and ``rows``.

    Args:
        target: As for `load`.
        draft: As for `load`.
        prompts: What each cell decodes.
        policies: Of `spmoe.runtime.POLICIES`.
        evictions: Of `spmoe.runtime.EVICTIONS`, or "auto".
        expert_memory: As for `load`.
        draft_lengths: Tokens drafted an iteration, or "auto".
        max_new_tokens: Of each prompt.
        repeats: Runs of each cell.
        link_gbps: Paces the link; 0 means as fast as it goes.
        device: As for `spmoe.load`.
        degrade_prediction: Share of predicted experts that are replaced by random ones.
        dtype: As for `load`.
        progress: Called after each run with a description, and done of total.

    Raises:
        InvalidArgument: A policy does not exist, or a setting is out of range.
    """
    if unknown := [policy for policy in policies if policy not in POLICIES]:
        raise InvalidArgument(f'policy "{unknown[0]}" asked; use some of {", ".join(POLICIES)}')
    if not 0 <= degrade_prediction <= 1 or repeats < 1:
        raise InvalidArgument(
            f"degrade_prediction must be in [0, 1] and repeats at least 1, got "
            f"{degrade_prediction} and {repeats}"
        )
    settings = Settings(dtype=dtype, link_gbps=link_gbps, device=device)
    report = progress or silent
    grid = itertools.product(policies, evictions, expert_memory, draft_lengths)
    # A policy that replays needs a run's routing, and with "auto" no run is like another.
    cells = [
        cell
        for cell in itertools.starmap(Cell, grid)
        if not (traits_of(cell.policy).replays and cell.draft_length == "auto")
    ]
    models = load_models(target, draft, settings)
    chosen = models.target.model.dtype
    runs = len(prompts) * (1 + repeats * (len(draft_lengths) + len(cells)))
    done = itertools.count(1)

    def count_run(description: str) -> None:
        report(description, next(done), runs)

    with open_engine(models, Cell(BASELINE, "auto", "100%", 0)) as warm:
        encoded = [warm.encode(prompt.text) for prompt in prompts]
    alone = list(_decode_alone(target, encoded, max_new_tokens, chosen, count_run))
    tallies = {cell: Tally() for cell in cells}
    resident: dict[int | str, Tally] = {length: Tally() for length in draft_lengths}
    routings: dict[tuple[int | str, int], Routing] = {}
    for _ in range(repeats):
        for number, tokens in enumerate(encoded):
            for length in draft_lengths:
                run_resident(models, length, tokens, max_new_tokens, resident[length])
                count_run(f"everything resident, draft length {length}")
            for cell in cells:
                key = (cell.draft_length, number)
                replays = traits_of(cell.policy).replays
                if replays and key not in routings:
                    routings[key] = record_routing(models, key[0], tokens, max_new_tokens)
                with open_engine(models, cell, paced=True) as engine:
                    if replays:
                        engine.runtime.replay_routing(routings[key])
                    if degrade_prediction:
                        degrade(engine.runtime, degrade_prediction)
                    text = run_prompt(engine, tokens, max_new_tokens, tallies[cell])
                own = alone[number]  # which an end-of-text token may end; cells go on
                tallies[cell].identical &= text[: len(own)] == own[: len(text)]
                count_run(f"{cell.policy}, {cell.expert_memory}, draft length {cell.draft_length}")
    peak = link_peak_gbps(models)
    rows = [
        to_row(cell, tallies[cell], peak_gbps=peak, prompts=len(prompts), dtype=chosen)
        for cell in cells
    ]
    add_bounds(rows, tallies.values(), resident, peak)
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": torch.get_num_threads(),
            "device": device_model(settings.device),
            "system": platform.platform(),
            "torch": torch.__version__,
        },
        "link_peak_gbps": peak,
        "paced": bool(link_gbps),
        "degrade_prediction": degrade_prediction,
        "rows": rows,
    }


def _decode_alone(
    target: str | PathLike[str],
    encoded: list[list[int]],
    count: int,
    dtype: torch.dtype,
    count_run: Any,
) -> Iterator[list[int]]:
    plain = load_plain(target, dtype=dtype)
    for tokens in encoded:
        yield generate_alone(plain, tokens, count)[0]
        count_run("the target alone")
