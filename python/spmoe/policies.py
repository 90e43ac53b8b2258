"""Policies as they describe themselves.

Importing this imports neither torch nor numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from spmoe import _core
from spmoe.config import check_choice

Source = Literal["draft", "target"]  # the model whose states a prediction is made from
SOURCES: tuple[Source, ...] = get_args(Source)


@dataclass(frozen=True, slots=True)
class Traits:
    """How a prefetch policy describes itself; no code outside its row goes by its name.

    Attributes:
        name: As users write it.
        eviction: The eviction policy that its source uses, which is what "auto" means.
        default_eviction: Where neither an eviction nor "auto" is asked for: the one of least
            traffic.
        reads: Models whose states its predictions are made from.
        limited_by: Member of `spmoe.planner.Limits` that says whether a prediction is of any use
            to it; None: each one is.
        replays: It has to be given the routing to come; see `Runtime.replay_routing`.
    """

    name: str
    eviction: str
    default_eviction: str
    reads: tuple[Source, ...] = ()
    limited_by: Literal["cutoff_layer", "break_even"] | None = None
    replays: bool = False


_ROWS = {row["name"]: Traits(**row) for row in _core.policies()}

POLICIES: tuple[str, ...] = tuple(_ROWS)  # of prefetching
EVICTIONS: tuple[str, ...] = tuple(row["name"] for row in _core.evictions())

DEFAULT = "horizon"  # of `load` and the command line
BASELINE = "on-demand"  # prefetches nothing: the default of `Runtime`, and what others start from
PROBE = "sp-moe"  # without limits it prefetches the top-k of each prediction: to measure the link


def traits_of(policy: str | Traits) -> Traits:
    """Return how a policy describes itself.

    Args:
        policy: One of `POLICIES`.

    Raises:
        InvalidArgument: It is none of them; the message names them.
    """
    if isinstance(policy, Traits):
        return policy
    check_choice("policy", policy, POLICIES)
    return _ROWS[policy]


def eviction_of(traits: Traits, eviction: str | None) -> str:
    """Return the eviction policy that a setting means beside a prefetch policy.

    Raises:
        InvalidArgument: It is neither "auto", None, nor one of `EVICTIONS`.
    """
    if eviction is None:
        return traits.default_eviction
    check_choice("eviction", eviction, ("auto", *EVICTIONS))
    return traits.eviction if eviction == "auto" else eviction


def instead(*unreadable: Source) -> str:
    """Return the cure of a message: policies that do without the states of some models."""
    names = [
        f'policy="{row.name}"'
        for row in _ROWS.values()
        if not row.replays and not set(unreadable) & set(row.reads)
    ]
    return f"use {' or '.join(names)}"
