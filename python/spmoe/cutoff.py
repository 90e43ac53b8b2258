"""How deep into the target drafting may prefetch: the latency model of one iteration.

Pure functions of measured costs. Layers are counted from 0; times are seconds from the moment at
which they are asked, drafting about to begin.

Source: SP-MoE, arXiv:2510.10302, section 3.2; the deadlines and budgets of `horizon` are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """What one machine needs for one pair; measured, never a constant of the code.

    Attributes:
        draft_s: One draft step, seconds.
        layer_s: Rows of a verification -> one target layer with everything resident, seconds.
        copy_s: Experts in a batch -> the whole batch from store to slots, seconds.
        expert_bytes: One expert.
    """

    draft_s: float
    layer_s: Mapping[int, float]
    copy_s: Mapping[int, float]
    expert_bytes: int

    def __post_init__(self) -> None:
        """Refuse costs that were not measured."""
        times = [self.draft_s, *self.layer_s.values(), *self.copy_s.values()]
        if not (
            self.layer_s
            and self.copy_s
            and all(math.isfinite(time) and time >= 0 for time in times)
            and self.expert_bytes > 0
        ):
            raise ValueError(
                f"costs must be measured and non-negative, got {self}; run `spmoe profile`"
            )

    def layer_at(self, rows: int) -> float:
        """Return seconds of one target layer over ``rows`` tokens."""
        return interpolate(self.layer_s, rows)

    def expert_copy_s(self, batch: int = 8) -> float:
        """Return seconds an expert takes on the link, inside a batch of so many."""
        return interpolate(self.copy_s, batch) / batch


def interpolate(samples: Mapping[int, float], at: int) -> float:
    """Return the value at ``at`` on the lines through the samples, extended at both ends.

    Args:
        samples: Place -> value, at least one.
        at: Where.
    """
    places = sorted(samples)
    if len(places) == 1:
        return samples[places[0]]
    after = next((i for i in range(1, len(places)) if places[i] >= at), len(places) - 1)
    left, right = places[after - 1], places[after]
    share = (at - left) / (right - left)
    return max(0.0, samples[left] + share * (samples[right] - samples[left]))


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
    link served in order, and that fit::

        (wanted[0] + ... + wanted[l]) * copy_s <= due[l]           for every l < L
        (wanted[0] + ... + wanted[L-1]) * expert_bytes <= free_bytes

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
    total = 0.0
    for layer, (time, count) in enumerate(zip(due, wanted, strict=True)):
        total += count
        if total * copy_s > time or total * costs.expert_bytes > free_bytes:
            return layer
    return len(due)
