"""`load`: from checkpoints to an engine that writes text."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike

import torch

from spmoe.arguments import check_model
from spmoe.costs.estimate import estimate
from spmoe.costs.memory_plan import plan_memory
from spmoe.costs.profile import Fingerprint, known_costs, known_layer_map
from spmoe.decoding.pairing import check_pairing
from spmoe.engine import Engine
from spmoe.models.cache_support import cache_support, why_not_draft
from spmoe.models.loading import load_draft, load_target, load_tokenizer
from spmoe.policies import DEFAULT, Policy
from spmoe.reporting.progress import Progress, Steps, silent
from spmoe.settings import Settings, check_dtype
from spmoe.system.expert_memory import free_bytes
from spmoe.system.out_of_memory import out_of_memory

log = logging.getLogger("spmoe")

_SMALLER_TARGET = 'use dtype="bfloat16", or a device with more memory'
_SMALLER_DRAFT = "use a smaller draft, or none"
_LESS_EXPERT_MEMORY = "lower expert_memory, or use a smaller draft"


def load(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None = None,
    *,
    expert_memory: int | str = "auto",
    device: str = "auto",
    pinned_memory: int | str = "auto",
    draft_length: int | str = "auto",
    policy: str | Policy = DEFAULT,
    eviction: str | None = "auto",
    dtype: torch.dtype | str | None = None,
    max_context: int | None = None,
    link_gbps: float = 0.0,
    trace_spans: int = 0,
    progress: Progress | None = None,
) -> Engine:
    """Load a Mixture-of-Experts model without its experts, and perhaps a draft for it.

    Args:
        target: Directory or hub id of the model whose output counts.
        draft: Directory or hub id of a model of the same tokenizer that proposes tokens; None
            decodes plainly. Changes speed, never the text.
        expert_memory: Memory for experts: "auto", "25%" of all, "6GiB", or bytes. "auto" is what
            fits: what is free on the device, less the models' other weights, their caches at
            ``max_context`` tokens, scratch and a reserve; see `spmoe.costs.memory_plan.MemoryPlan`.
        device: Of all that computes: "host", "cuda", "cuda:<index>", or "auto": CUDA where it can
            be used.
        pinned_memory: Experts to hold in page-locked RAM, from which a CUDA device copies at full
            speed: an amount as for ``expert_memory``, 0 for none, or "auto": all that fit in RAM,
            none on the host.
        draft_length: Tokens drafted an iteration, from 0 to 31, or "auto": chosen each time.
        policy: What is prefetched: one of `spmoe.runtime.POLICIES`, or a `Policy`. Changes speed,
            never the text.
        eviction: What leaves for it: one of `spmoe.runtime.EVICTIONS`, "auto", or None, as for
            `Settings`.
        dtype: Of the target's activations and of all its weights but the experts', which keep the
            checkpoint's; None means float32 on the host, the checkpoint's own on CUDA. The draft
            keeps its checkpoint's.
        max_context: Tokens of prompt and answer that memory is kept for; None: the model's own
            context, 4096 at most.
        link_gbps: Paces the link to so many 10^9 bytes a second; 0 means as fast as it goes.
        trace_spans: Spans of time that `Runtime.spans` keeps.
        progress: Called as things are loaded, with a description, and done of total.

    Raises:
        InvalidArgument: A setting is wrong, which is found before anything is read; a model without
            experts, a budget too small, a draft that does not fit.
        CheckpointError: A shard is missing or damaged.
        OutOfMemory: More memory is asked than is available, or a model does not fit.
        DeviceError: The CUDA device cannot be used; the message says why.
    """
    settings = Settings(
        expert_memory=expert_memory,
        device=device,
        pinned_memory=pinned_memory,
        draft_length=draft_length,
        policy=policy,
        eviction=eviction,
        dtype=dtype,
        max_context=max_context,
        link_gbps=link_gbps,
        trace_spans=trace_spans,
    )
    check_model("target", target)
    if draft is not None:
        check_model("draft", draft)
    return _load(target, draft, settings, progress or silent)


def _load(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None,
    settings: Settings,
    progress: Progress,
) -> Engine:
    place = settings.place
    free_before = free_bytes(place)
    limited = settings.traits.limited_by is not None
    measured = limited or (settings.draft_length == "auto" and draft is not None)
    steps = Steps(progress, 2 + (draft is not None) + measured)
    with (
        steps.step("target", "loading the target without its experts"),
        out_of_memory(f"{target} without its experts", _SMALLER_TARGET),
    ):
        loaded = load_target(target, dtype=check_dtype(settings.dtype), device=place)
        tokenizer = load_tokenizer(target)
        cache_support(loaded.model)  # a model that cannot run says so before memory is filled
    drafter, note = None, "no draft model"
    if draft is not None:
        with (
            steps.step("draft", "loading the draft"),
            out_of_memory(f"the draft {draft}", _SMALLER_DRAFT),
        ):
            drafter = load_draft(draft, device=place)
            check_pairing(tokenizer, load_tokenizer(draft), loaded.model.config, drafter.config)
        if reason := why_not_draft(loaded.model, drafter):
            log.warning("decoding plainly, without the draft: %s", reason)
            drafter, note = None, reason
    plan = plan_memory(
        loaded.model,
        drafter,
        loaded.store,
        expert_memory=settings.expert_memory,
        experts_per_token=loaded.experts_per_token,
        device=place,
        free_before=free_before,
        max_context=settings.max_context,
    )
    log.info("%s", plan.describe())
    with out_of_memory("the pass that measures the pair", _LESS_EXPERT_MEMORY), ExitStack() as undo:
        with steps.step("expert memory", f"allocating {plan.describe()}"):
            runtime = loaded.open_runtime(
                replace(settings, expert_memory=plan.expert_bytes), progress=progress
            )
            undo.callback(runtime.close)
        costs = layer_map = None
        if measured:
            with steps.step("costs", "estimating costs"):
                fingerprint = Fingerprint.of(target, draft, settings, dtype=loaded.model.dtype)
                layer_map = known_layer_map(fingerprint, loaded, drafter)
                costs = known_costs(fingerprint, loaded.store.blob_bytes)
                if costs is None:
                    costs = estimate(loaded, drafter, runtime, progress=steps.within)
        engine = Engine(
            loaded,
            tokenizer,
            runtime,
            draft=drafter,
            draft_length=settings.draft_length,
            costs=costs,
            layer_map=layer_map,
            on_close=loaded.store.close,
        )
        undo.pop_all()
    steps.report("ready", steps.count, steps.count)
    engine.draft_note = None if drafter is not None else note
    engine.load_seconds = steps.seconds
    engine.memory = plan
    engine.prompt_chunk = plan.prompt_chunk
    log.info("%r", engine)
    return engine
