"""Policies as they describe themselves, and `Policy`, the base of those written in Python.

Importing this imports neither torch nor numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from spmoe import _core
from spmoe.arguments import choice
from spmoe.errors import InvalidArgument

if TYPE_CHECKING:
    import numpy as np

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
        limited_by: Member of `Plan` in decoding/planner.py that says whether a prediction is of
            any use to it; None: each one is.
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


@dataclass(frozen=True, slots=True)
class Event:
    """The latest event in a `Runtime`, for a `Policy` to plan by.

    Attributes:
        kind: "prediction": scores for a layer are known. "access": the target's router has chosen
            the experts of a layer, which are about to run. "end": an iteration has ended.
        layer: MoE layer of the prediction or the access, 0-based; 0 at an end.
        resident: [layers, experts], bool: in memory, or on the link.
        source: Model whose states a prediction was made from.
        scores: [experts], float32, of a prediction: the router's probabilities summed over tokens,
            and 1 more for each token whose router selects the expert.
        experts: [count], int64, ascending: chosen in an access.
    """

    kind: Literal["prediction", "access", "end"]
    layer: int
    resident: np.ndarray[Any, Any]
    source: Source | None = None
    scores: np.ndarray[Any, Any] | None = None
    experts: np.ndarray[Any, Any] | None = None


class Policy(ABC):
    """A prefetch policy written in Python, for study: `plan` says which experts to prefetch.

    An instance goes to `spmoe.load` or `spmoe.Runtime` as ``policy``. It is slower than the
    policies in C++: each event calls Python, and on a CUDA device waits for the scores or the
    router's choice. Tokens never depend on it.

    Attributes:
        name: In statistics and messages; empty: the name of the class.
        eviction: Eviction policy for "auto": one of `EVICTIONS`; "auto": the baseline's.
        reads: Models whose states `spmoe.load` makes predictions from for it.
    """

    name: str = ""
    eviction: str = "auto"
    reads: tuple[Source, ...] = SOURCES

    @abstractmethod
    def plan(self, event: Event) -> Iterable[tuple[int, int]] | None:
        """Return the prefetches to make from now on, the first to be served first.

        They replace those of earlier plans that have not begun. One that is resident already is
        kept until its layer has run. Prefetches of a layer end when it runs, all that wait at the
        end of an iteration. One thread at a time calls it: the one that caused the event. Passes
        over more than 32 tokens, which are prompts, cause no access. Passes that measure costs
        while `spmoe.load` runs cause events too.

        Args:
            event: What has just happened.

        Returns:
            (layer, expert) of each, 0-based; None leaves the plan as it is.

        Raises:
            Exception: Any ends the policy, with one warning: experts are then fetched on demand.
        """

    def traits(self) -> Traits:
        """Return how the policy describes itself.

        Raises:
            InvalidArgument: ``eviction`` or ``reads`` is none of its values.
        """
        choice("Policy.eviction", self.eviction, ("auto", *EVICTIONS))
        for source in self.reads:
            choice("Policy.reads", source, SOURCES)
        eviction = _ROWS[BASELINE].eviction if self.eviction == "auto" else self.eviction
        name = self.name or type(self).__name__
        return Traits(name, eviction, eviction, reads=tuple(self.reads))


def traits_of(policy: str | Policy | Traits) -> Traits:
    """Return how a policy describes itself.

    Args:
        policy: One of `POLICIES`, or an instance of `Policy`.

    Raises:
        InvalidArgument: It is neither; the message names the policies.
    """
    if isinstance(policy, Traits):
        return policy
    if isinstance(policy, Policy):
        return policy.traits()
    if isinstance(policy, type) and issubclass(policy, Policy):
        raise InvalidArgument(
            f"policy is the class {policy.__name__}; give an instance, {policy.__name__}()"
        )
    choice("policy", policy, POLICIES)
    return _ROWS[policy]


def eviction_of(traits: Traits, eviction: str | None) -> str:
    """Return the eviction policy that a setting means beside a prefetch policy.

    Raises:
        InvalidArgument: It is neither "auto", None, nor one of `EVICTIONS`.
    """
    if eviction is None:
        return traits.default_eviction
    choice("eviction", eviction, ("auto", *EVICTIONS))
    return traits.eviction if eviction == "auto" else eviction


def instead(*unreadable: Source) -> str:
    """Return the cure of a message: policies that do without the states of some models."""
    names = [
        f'policy="{row.name}"'
        for row in _ROWS.values()
        if not row.replays and not set(unreadable) & set(row.reads)
    ]
    return f"use {' or '.join(names)}"
