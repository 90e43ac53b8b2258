"""The time of an iteration by the measured costs of a machine, before any iteration has run.

Pure functions. Routing is taken to be uniform, and every prediction to be right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from spmoe.costs.costs import Costs
from spmoe.costs.cutoff import break_even

if TYPE_CHECKING:
    from spmoe.policies import Traits

# Demands wait for less than their copies take: other experts are computed meanwhile. From this
# share of a copy's time, what prefetches take from compute may be more, and both are measured.
_DOUBTFUL = 0.25


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model and of its expert memory.

    Attributes:
        layers: MoE layers.
        experts: Of each layer.
        experts_per_token: The routers' top-k.
        memory_bytes: For experts.
    """

    layers: int
    experts: int
    experts_per_token: int
    memory_bytes: int


class Choice(NamedTuple):
    """The draft length of an iteration, and whether it prefetches.

    Attributes:
        length: Tokens drafted.
        prefetch: Whether experts are fetched while the draft and the layers compute.
    """

    length: int
    prefetch: bool


def choices(costs: Costs, policy: Traits, lengths: Iterable[int]) -> list[Choice]:
    """Return the choices among some draft lengths that may be the best under a policy.

    Policies without limits have no choice of whether to prefetch. Policies that read the draft's
    states alone have none where nothing is drafted.
    """
    share = break_even(prefetch_s=costs.prefetch_s, wait_s=costs.expert_copy_s())
    arms = [True] if share <= _DOUBTFUL else [True, False] if share < 1 else [False]

    def foresees(length: int) -> bool:
        return policy.limited_by is not None and (length > 0 or "target" in policy.reads)

    return [
        Choice(length, arm) for length in lengths for arm in (arms if foresees(length) else [False])
    ]


def expected_fills(costs: Costs, shape: Shape, rows: int) -> float:
    """Return how many experts a verification of ``rows`` tokens has to fetch, in all layers.

    Each layer lacks the share of its experts that memory cannot hold.
    """
    total_bytes = shape.layers * shape.experts * costs.expert_bytes
    missing = max(0.0, 1 - shape.memory_bytes / total_bytes)
    distinct = shape.experts * (1 - (1 - shape.experts_per_token / shape.experts) ** rows)
    return shape.layers * distinct * missing


def expected_s(costs: Costs, shape: Shape, choice: Choice) -> float:
    """Return how long an iteration takes, seconds.

    Verification waits for every fill that is not prefetched. Prefetches slow compute, and the link
    works while the draft and the layers compute.
    """
    rows = choice.length + 1
    fills = expected_fills(costs, shape, rows)
    compute_s = choice.length * costs.draft_s + shape.layers * costs.layer_at(rows)
    link_s = fills * costs.expert_copy_s()
    if not choice.prefetch:
        return compute_s + link_s
    compute_s += fills * costs.prefetch_s
    return max(compute_s, link_s)
