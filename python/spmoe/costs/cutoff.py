"""How deep into the target drafting may prefetch: the latency model of one iteration.

Pure functions of measured costs. Layers are counted from 0; times are seconds from the moment at
which they are asked, drafting about to begin.

Source: SP-MoE, arXiv:2510.10302, section 3.2; the deadlines and budgets of `horizon` are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from spmoe.costs.costs import Costs


def deadlines(costs: Costs, *, draft_steps: int, rows: int, layer_count: int) -> list[float]:
    """Return when verification reaches each layer, if it never waits for the link.

    Args:
        costs: Of this machine.
        draft_steps: Draft steps that are still to run.
        rows: Tokens of the verification.
        layer_count: MoE layers of the target.

    Returns:
        [layer_count] seconds, ascending.

    Raises:
        ValueError: There are no layers or rows, or fewer draft steps than none.
    """
    for name, count in (("layer_count", layer_count), ("rows", rows)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if draft_steps < 0:
        raise ValueError(f"draft_steps must not be negative, got {draft_steps}")
    layer_s = costs.layer_at(rows)
    return [draft_steps * costs.draft_s + layer * layer_s for layer in range(layer_count)]


def byte_budget(due: Sequence[float], costs: Costs) -> list[int]:
    """Return how many bytes the link can move until each layer runs.

    Args:
        due: From `deadlines`.
        costs: Of this machine.
    """
    copy_s = costs.expert_copy_s()
    if copy_s == 0:
        return [1 << 62] * len(due)
    return [int(time / copy_s * costs.expert_bytes) for time in due]


def waits_s(
    due: Sequence[float],
    wanted: Sequence[float],
    costs: Costs,
    *,
    free_bytes: int,
    recall: float = 1.0,
    predicted: float = 1.0,
) -> list[float]:
    """Return how long verification waits for the link, by the layers that are prefetched for.

    It demands what it lacks of the other layers, and what nobody foresaw of these, each when the
    layer's router has chosen. Prefetches are served in order, wrong ones among them, while the
    draft and the layers before compute. A layer's experts need room from when their copies begin
    until it has run: where memory is full, the link waits for the oldest layer that is held to run.

    Args:
        due: From `deadlines`, one for each layer.
        wanted: Experts of each layer that are expected to need a fill.
        costs: Of this machine.
        free_bytes: Device memory for prefetched experts.
        recall: Share of the needed experts that are predicted.
        predicted: Experts that are predicted, right or wrong, for each that is needed.

    Returns:
        Seconds with no layer prefetched for, with the first, with the first two and so on, as far
        as memory holds a layer's fills.

    Raises:
        ValueError: The lists differ in length, or a count or share is not one.
    """
    if len(due) != len(wanted) or not all(count >= 0 for count in wanted) or free_bytes < 0:
        raise ValueError(
            f"need as many deadlines as non-negative counts, got {len(due)} and {list(wanted)}, "
            f"and memory that is not negative, got {free_bytes}"
        )
    if not (0 <= recall <= min(1, predicted) and math.isfinite(predicted)):
        raise ValueError(
            f"need a recall in [0, 1] of no more than is predicted, got {recall} of {predicted}"
        )
    copy_s = costs.expert_copy_s()
    room = free_bytes / costs.expert_bytes  # experts
    fills = [count * predicted for count in wanted]
    reached: list[float] = []  # when verification gets to each layer, its waits included
    waited_s = link_free_s = held = 0.0
    demands_s = sum(wanted) * copy_s  # of the layers from here on
    waits = [demands_s]
    oldest = 0
    for layer, count in enumerate(wanted):
        reached.append(due[layer] + waited_s)
        while held + fills[layer] > room and oldest < layer:
            held -= fills[oldest]
            oldest += 1
            link_free_s = max(link_free_s, reached[oldest])  # when the layer before it has run
        if held + fills[layer] > room:
            break
        held += fills[layer]
        link_free_s += fills[layer] * copy_s
        missed_s = count * (1 - recall) * copy_s
        waited_s += max(0.0, link_free_s - reached[layer]) + missed_s
        link_free_s += missed_s  # demands go ahead
        demands_s -= count * copy_s
        waits.append(waited_s + demands_s)
    return waits


def cutoff_layer(waits: Sequence[float]) -> int:
    """Return the cutoff layer L with which verification waits least.

    Of equals it is the shallowest, since a prefetch that saves nothing may be wrong. 0 means that
    prefetching cannot pay. Unlike `paper_cutoff_layer`, it admits a prefetch that arrives late but
    sooner than a demand would, and frees a layer's slots once the layer has run.

    Args:
        waits: From `waits_s`.
    """
    least_s = min(waits) + 1e-9 * waits[0]  # sums of seconds round
    return next(layer for layer, wait_s in enumerate(waits) if wait_s <= least_s)


def paper_cutoff_layer(
    due: Sequence[float], experts_per_token: int, costs: Costs, *, free_bytes: int
) -> int:
    """Return the paper's cutoff layer L: the critical experts of L layers arrive in time and fit.

    The largest L with ``L * k * copy_s <= T_draft`` and ``L * k * expert_bytes <= free_bytes``.

    Args:
        due: From `deadlines`; drafting takes T_draft seconds, until the first layer is due.
        experts_per_token: Critical experts of a layer, k.
        costs: Of this machine.
        free_bytes: Device memory for prefetched experts.

    Source: SP-MoE, arXiv:2510.10302, section 3.2.
    """
    layer_s = experts_per_token * costs.expert_copy_s()
    in_time = due[0] / layer_s + 1e-9 if layer_s else math.inf  # seconds round
    fits = free_bytes // (experts_per_token * costs.expert_bytes)
    return int(min(in_time, fits, len(due)))


def break_even(*, prefetch_s: float, wait_s: float) -> float:
    """Return the probability of use from which a prefetch pays.

    A prefetch that is used saves what compute would wait for a demand; used or not, it slows what
    is computed meanwhile. It pays from where ``p * wait_s >= prefetch_s``; at 1 none does.

    Args:
        prefetch_s: Compute time lost to an expert that arrives meanwhile, seconds.
        wait_s: Time that compute waits for an expert that it has to demand, seconds.

    Returns:
        A probability in [0, 1].
    """
    return 1.0 if wait_s <= prefetch_s else prefetch_s / wait_s
