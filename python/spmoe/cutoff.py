"""How deep into the target drafting may prefetch: the latency model of one iteration.

Pure functions of measured costs. Layers are counted from 0; times are seconds from the moment at
which they are asked, drafting about to begin.

Source: SP-MoE, arXiv:2510.10302, section 3.2; the deadlines and budgets of `horizon` are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from spmoe.costs import Costs


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


def cutoff_layer(
    due: Sequence[float], wanted: Sequence[float], costs: Costs, *, free_bytes: int
) -> int:
    """Return how many leading layers to prefetch for: the paper's cutoff layer L.

    The largest ``L`` whose every layer's predicted experts arrive before verification reaches it,
    link served in order. A layer's experts need room from when their copies begin until it has
    run: where memory is full, the link waits for the oldest layer that is held to run.

    With equal layers whose compute takes no time it is the paper's
    ``L * k * copy_s <= T_draft`` and ``L * k * bytes <= free``.

    Args:
        due: From `deadlines`, one for each layer.
        wanted: Critical experts of each layer that are expected to need a fill.
        costs: Of this machine.
        free_bytes: Device memory for prefetched experts.

    Returns:
        A count in ``[0, len(due)]``; 0 means that prefetching cannot pay.

    Raises:
        ValueError: The lists differ in length, or a count is negative or NaN.
    """
    if len(due) != len(wanted) or not all(count >= 0 for count in wanted) or free_bytes < 0:
        raise ValueError(
            f"need as many deadlines as non-negative counts, got {len(due)} and {list(wanted)}, "
            f"and memory that is not negative, got {free_bytes}"
        )
    copy_s = costs.expert_copy_s()
    room = free_bytes / costs.expert_bytes  # experts
    arrival_s = held = 0.0
    oldest = 0
    for layer, count in enumerate(wanted):
        while held + count > room and oldest < layer:
            held -= wanted[oldest]
            oldest += 1
            arrival_s = max(arrival_s, due[oldest])  # when the layer before it has run
        held += count
        arrival_s += count * copy_s
        if held > room or arrival_s > due[layer]:
            return layer
    return len(due)


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
