"""Costs of one pair on one machine: seconds and bytes, measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of one pair on one machine; measured, never a constant of the code.

    Attributes:
        draft_s: One draft step, seconds; 0 without a draft.
        layer_s: Rows of a verification -> one target layer with everything resident, seconds.
        copy_s: Experts in a batch -> the whole batch from store to slots, seconds.
        expert_bytes: One expert.
        prefetch_s: Compute time lost to an expert that arrives meanwhile, seconds: copying takes
            processor and memory from it. 0 where it does not.
        draft_token_s: Each further token that the draft reads in one pass, seconds.
    """

    draft_s: float
    layer_s: Mapping[int, float]
    copy_s: Mapping[int, float]
    expert_bytes: int
    prefetch_s: float = 0.0
    draft_token_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse costs that were not measured."""
        singles = (self.draft_s, self.prefetch_s, self.draft_token_s)
        times = [*singles, *self.layer_s.values(), *self.copy_s.values()]
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
        """Return seconds an expert takes on the link, inside a batch of so many.

        Or of as many as were measured: a layer may have fewer experts.
        """
        batch = min(batch, max(self.copy_s))
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
