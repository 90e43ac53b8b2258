"""Measuring a pair on this machine, for a profile."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from os import PathLike

from spmoe.arguments import check_model
from spmoe.costs import probe
from spmoe.costs.costs import Costs
from spmoe.costs.profile import Fingerprint, Profile
from spmoe.errors import InvalidArgument
from spmoe.models.cached import CausalLM
from spmoe.models.experts import attach
from spmoe.models.loading import (
    TargetModel,
    load_draft,
    load_target,
    load_tokenizer,
)
from spmoe.policies import PROBE
from spmoe.prediction import layer_map as layer_maps
from spmoe.prediction.calibration import tokenize_calibration
from spmoe.prediction.predictor import draft_mismatch
from spmoe.prompts import load_prompts
from spmoe.reporting.progress import Progress, silent
from spmoe.runtime import Runtime
from spmoe.settings import RuntimeSettingNames, Settings, check_dtype
from spmoe.system.expert_memory import expert_budget, slot_bytes
from spmoe.system.pinned import pinned_budget

log = logging.getLogger("spmoe")

ROWS = (1, 2, 3, 5, 9, 17)  # of a verification
BATCHES = (1, 2, 4, 8)  # experts that a layer demands at once

_MEASURE_TOKENS = 64  # of the text that layers are measured on
_LINK_SLOTS = 16  # of the small pool that the link is measured with
_LOSS_SAMPLES = 5  # a round, of what a prefetch takes: a difference of noisy times


def make_profile(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None,
    settings: Settings | None = None,
    *,
    repeats: int = 7,
    progress: Progress | None = None,
) -> Profile:
    """Load a pair and measure it; a draft of another depth or width gets a layer map.

    The result is not saved yet.

    Args:
        target: As for `spmoe.load`.
        draft: As for `spmoe.load`.
        settings: As for `measure`; None measures in memory for half of the experts.
        repeats: As for `measure`.
        progress: As for `measure`.

    Raises:
        InvalidArgument: As for `spmoe.load`.
    """
    check_model("target", target)
    if draft is not None:
        check_model("draft", draft)
    settings = settings or Settings(expert_memory="50%")
    loaded = load_target(target, dtype=check_dtype(settings.dtype), device=settings.place)
    drafter = load_draft(draft, device=settings.place) if draft is not None else None
    text = load_prompts()[0].text
    tokenizer = load_tokenizer(target)
    tokens: list[int] = tokenizer(text)["input_ids"]
    costs, spread = measure(
        loaded,
        drafter,
        (tokens * _MEASURE_TOKENS)[:_MEASURE_TOKENS],
        settings,
        repeats=repeats,
        progress=progress,
    )
    layer_map = None
    if drafter is not None and draft_mismatch(loaded, drafter):
        unpaced = _in_files(settings) | RuntimeSettingNames(link_gbps=0.0)
        with loaded.open_runtime(**unpaced) as runtime:
            attach(loaded, runtime)
            documents = tokenize_calibration(tokenizer)
            try:
                layer_map = layer_maps.fit(loaded, drafter, documents, progress=progress)
            except InvalidArgument as error:
                log.warning("the costs are kept without a layer map: %s", error)
    fingerprint = Fingerprint.of(target, draft, settings, dtype=loaded.model.dtype)
    return Profile(costs, spread, fingerprint, layer_map)


def measure(
    target: TargetModel,
    draft: CausalLM | None,
    tokens: Sequence[int],
    settings: Settings,
    *,
    repeats: int = 7,
    rows: Sequence[int] = ROWS,
    batches: Sequence[int] = BATCHES,
    progress: Progress | None = None,
) -> tuple[Costs, dict[str, float]]:
    """Measure a pair on this machine, costs taking turns, so that drift hits all alike.

    Args:
        target: A runtime that is closed by then is attached afterwards.
        draft: Perhaps none.
        tokens: A text, longer than the most rows.
        settings: Memory, device and link. Layers are measured in ``expert_memory``: larger is
            truer, since their experts should be resident. Only what the link is measured with is in
            page-locked memory: experts from where they will come from, in part if only a part will.
        repeats: Rounds in which each cost is sampled; what a prefetch takes five times.
        rows: Of a verification, at least one count.
        batches: Experts that a layer demands at once.
        progress: Called after each round, with a description, and done of total.

    Returns:
        The costs, and the spread of each.
    """
    report = progress or silent
    with ExitStack() as pools:
        toured = max(batches) * target.store.layer_count * target.store.blob_bytes
        small = pools.enter_context(_small_pool(target, settings, toured))
        samplers: dict[tuple[str, int], Iterator[float]] = {}
        work: Callable[[], object] = probe.head_reader(target.model)
        if draft is not None:
            samplers["draft_s", 0] = probe.draft_steps(draft, tokens)
            samplers["draft_token_s", 0] = probe.draft_tokens(draft, tokens)
            work = partial(next, probe.draft_steps(draft, tokens))
        runtime = target.open_runtime(**_in_files(settings))
        attach(target, pools.enter_context(runtime))
        for at in rows:
            samplers["layer_s", at] = probe.target_layers(target, runtime, tokens, at)
        largest = min(target.store.expert_count, small.stats(by_layer=False)["slots"])
        for at in sorted({min(batch, largest) for batch in batches}):
            samplers["copy_s", at] = probe.copies(small, at)
        samplers["prefetch_s", 0] = probe.losses(small, target.experts_per_token, work)
        counts = {"prefetch_s": _LOSS_SAMPLES}
        samples: dict[tuple[str, int], list[float]] = {key: [] for key in samplers}
        for number in range(repeats + 1):
            for key, sampler in samplers.items():
                taken = list(itertools.islice(sampler, counts.get(key[0], 1)))
                if number > 0:  # the first round prepares: pages are touched, kernels chosen
                    samples[key] += taken
            report("measuring costs", number, repeats)
    medians = {key: statistics.median(values) for key, values in samples.items()}
    # A prefetch that does not pay is worse than none, and this difference is the noisiest sample.
    medians["prefetch_s", 0] += probe.standard_error(samples["prefetch_s", 0])
    by_name: dict[str, dict[int, float]] = {"layer_s": {}, "copy_s": {}}
    for (name, at), seconds in medians.items():
        by_name.setdefault(name, {})[at] = seconds
    costs = Costs(
        draft_s=medians.get(("draft_s", 0), 0.0),
        layer_s=by_name["layer_s"],
        copy_s=by_name["copy_s"],
        expert_bytes=target.store.blob_bytes,
        prefetch_s=medians["prefetch_s", 0],
        draft_token_s=medians.get(("draft_token_s", 0), 0.0),
    )
    spread = {
        f"{name}[{at}]" if at else name: _spread(values) for (name, at), values in samples.items()
    }
    return costs, spread


def _in_files(settings: Settings) -> RuntimeSettingNames:
    """Return the settings of a runtime to compute with, whose experts stay in their files."""
    return RuntimeSettingNames(
        expert_memory=settings.expert_memory,
        device=settings.device,
        link_gbps=settings.link_gbps,
        pinned_memory=0,
    )


def _small_pool(target: TargetModel, settings: Settings, toured_bytes: int) -> Runtime:
    """Return a runtime to measure the link with: larger than a batch, smaller than the budget.

    As much of ``toured_bytes`` is page-locked as would be of all experts.
    """
    store = target.store
    slots = min(_LINK_SLOTS, store.layer_count * store.expert_count // 2)
    wanted = slot_bytes(store, max(slots, target.experts_per_token))
    given = expert_budget(settings.expert_memory, store, settings.place)
    budget = pinned_budget(settings.pinned_memory, store.total_bytes, settings.place)
    share = min(budget / store.total_bytes, 1.0)
    return target.open_runtime(
        **_in_files(settings)
        | RuntimeSettingNames(
            expert_memory=min(wanted, given),
            pinned_memory=int(share * min(toured_bytes, store.total_bytes)),
            policy=PROBE,
        )
    )


def _spread(values: Sequence[float]) -> float:
    """Return the interquartile range over the median."""
    if len(values) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(values, n=4)
    return (third - first) / middle if middle else 0.0
