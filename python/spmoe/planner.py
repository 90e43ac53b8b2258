"""What the coming iteration may prefetch, from measured costs and from what the last ones did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spmoe.config import MAX_ROWS
from spmoe.costs import Costs
from spmoe.counters import Counters
from spmoe.cutoff import break_even, byte_budget, cutoff_layer, deadlines, waits_s
from spmoe.draft_length import SMALL_BACKLOG, Measured
from spmoe.fading import FadingMean, blend
from spmoe.policies import Traits, traits_of

# A demand may wait for less than its copy takes, since it lands while others are computed. Where a
# prefetch takes more than this share of a copy from compute, it is tried what demands wait for: in
# the first iteration, and in every so many.
_DOUBTFUL_SHARE = 0.25
_TRIAL_EVERY = 32

_NEWEST = 0.2  # weight of the newest iteration in what is learnt


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


@dataclass(frozen=True, slots=True)
class Limits:
    """What an iteration may prefetch.

    Attributes:
        cutoff_layer: Leading layers that drafting prefetches for.
        budget_bytes: What the link can move until each layer runs.
        break_even: Probability of use from which a prefetch pays.
        read_last: Another draft step, for predictions alone, is expected to pay.
    """

    cutoff_layer: int
    budget_bytes: list[int]
    break_even: float
    read_last: bool

    def uses_prediction(self, policy: str | Traits, layer: int) -> bool:
        """Whether a policy would do anything about a prediction for a layer."""
        limited_by = traits_of(policy).limited_by
        if limited_by == "cutoff_layer":
            return layer < self.cutoff_layer
        return limited_by is None or self.break_even < 1


class Planner:
    """Sets the limits of each iteration; times of compute follow what iterations really take.

    Source: SP-MoE, arXiv:2510.10302, section 3.2, for the cutoff layer; the rest is ours.

    Args:
        costs: Of this machine.
        shape: Of the target and its expert memory.
        policy: Name or traits of what is prefetched by.
    """

    def __init__(self, costs: Costs, shape: Shape, *, policy: str | Traits) -> None:
        self.costs = costs
        self.shape = shape
        self.policy = traits_of(policy)
        self._demand_s = FadingMean(_NEWEST)  # waited for a demanded expert, nothing prefetched
        self._iterations = 0
        self._on_trial = False
        # What iterations of late waited for the link, and the same by the model of it; by whether
        # anything was prefetched.
        self._waited_s = {kind: FadingMean(_NEWEST) for kind in (False, True)}
        self._modelled_s = {kind: FadingMean(_NEWEST) for kind in (False, True)}
        self._expected_s: dict[int, float] = {}  # rows -> what `verify_s` returned
        self._fill_share = FadingMean(_NEWEST)  # fills of the experts that are needed
        self._pool = float(shape.experts)  # as if tokens drew their experts from so few
        self._last_rows = 0
        # By whether the draft read its last token.
        self._recall = {kind: FadingMean(_NEWEST) for kind in (False, True)}
        self._predicted = 1.0  # experts, right or wrong, for each that is needed
        self._measured_rows: set[int] = set()

    def limits(self, draft_length: int) -> Limits:
        """Return what an iteration that drafts ``draft_length`` tokens may prefetch."""
        read_last = draft_length > 0 and self._last_token_pays(draft_length)
        due = self._deadlines(draft_length + read_last, draft_length + 1)
        doubtful = self.costs.prefetch_s > _DOUBTFUL_SHARE * self.costs.expert_copy_s()
        self._on_trial = doubtful and self._iterations % _TRIAL_EVERY == 0
        pays_from = 1.0 if self._on_trial else self._break_even()
        depth = 0  # no deeper than pays
        if pays_from < 1 and self.policy.limited_by == "cutoff_layer":
            fills = self._fills(draft_length + 1)
            waits = self._waits(due, fills, read_last=read_last, predicted=self._predicted)
            depth = cutoff_layer(waits)
        return Limits(
            cutoff_layer=depth,
            budget_bytes=byte_budget(due, self.costs),
            break_even=pays_from,
            read_last=read_last,
        )

    def observe(
        self,
        iteration: Measured,
        grown: Counters,
        *,
        read_last: bool,
        reread: int = 0,
    ) -> None:
        """Learn from an iteration, the prefill apart.

        Args:
            iteration: Its tokens and times.
            grown: How much the counters grew.
            read_last: Whether the draft read its last token.
            reread: Tokens that the target read again.
        """
        rows = iteration.drafted + 1 + reread
        if rows > MAX_ROWS:
            return
        self._iterations += 1
        self._expected_s.clear()
        compute_s = max(0.0, iteration.verify_s - grown.stall_s) / self.shape.layers
        self.costs = replace(self.costs, layer_s=self._with_layer(rows, compute_s))
        if (step_s := _step_s(iteration)) is not None:
            known_s = self.costs.draft_s or step_s
            self.costs = replace(self.costs, draft_s=blend(known_s, step_s, _NEWEST))
        fills = grown.link_bytes / self.costs.expert_bytes
        if needed := grown.needed:
            self._fill_share.add(fills / needed)
            self._observe_routing(rows, needed, grown.repeated)
        prefetched = self._prefetches(rows) and not self._on_trial
        self._modelled_s[prefetched].add(self._wait_s(rows, fills, prefetched=prefetched))
        self._waited_s[prefetched].add(grown.stall_s)
        demanded = self._on_trial or self._break_even() == 1  # all of it
        if demanded and (waits := grown.misses + grown.late):
            self._demand_s.add(grown.stall_s / waits)
        if grown.predicted_needs:
            self._recall[read_last].add(grown.recalled / grown.predicted_needs)
            predicted = grown.critical / grown.predicted_needs
            self._predicted = blend(self._predicted, predicted, _NEWEST)

    @property
    def draft_s(self) -> float:
        """Seconds that a draft step is expected to take, copies beside it where they may pay."""
        copy_s = self.costs.expert_copy_s()
        share = self.costs.prefetch_s / copy_s if copy_s and self._prefetches(2) else 0.0
        return self.costs.draft_s * (1 + share)

    def verify_s(self, rows: int) -> float:
        """Return how long a verification of ``rows`` tokens is expected to take, seconds.

        Compute with everything resident; and the waits for the link that the model of it says, with
        drafting before, as iterations of late correct them: in proportion where they waited less,
        by the difference where they waited more.
        """
        known = self._expected_s.get(rows)
        if known is not None:
            return known
        prefetches = self._prefetches(rows)
        wait_s = self._wait_s(rows, self._fills(rows), prefetched=prefetches)
        waited_s = self._waited_s[prefetches].value
        modelled_s = self._modelled_s[prefetches].value
        if waited_s is not None and modelled_s is not None:
            if waited_s < modelled_s:
                wait_s *= waited_s / modelled_s
            else:
                wait_s += waited_s - modelled_s
        expected_s = self.shape.layers * self.costs.layer_at(rows) + wait_s
        self._expected_s[rows] = expected_s  # another thread's `observe` may clear it at once
        return expected_s

    def _deadlines(self, draft_steps: int, rows: int) -> list[float]:
        return deadlines(
            self.costs, draft_steps=draft_steps, rows=rows, layer_count=self.shape.layers
        )

    def _break_even(self) -> float:
        wait_s = self._demand_s.value
        if wait_s is None:
            wait_s = self.costs.expert_copy_s()
        return break_even(prefetch_s=self.costs.prefetch_s, wait_s=wait_s)

    def _prefetches(self, rows: int) -> bool:
        """Whether anything may be prefetched for a verification of ``rows`` tokens."""
        foreseen = "target" in self.policy.reads or rows > 1  # the draft's states tell of drafts
        limited = self.policy.limited_by is not None
        return limited and foreseen and self._break_even() < 1

    def _waits(
        self, due: Sequence[float], fills: float, *, read_last: bool, predicted: float
    ) -> list[float]:
        """Return `waits_s` of an iteration, by the layers that are prefetched for."""
        return waits_s(
            due,
            [fills / self.shape.layers] * self.shape.layers,
            self.costs,
            free_bytes=self.shape.memory_bytes,
            recall=min(self._recall_of(read_last), predicted),
            predicted=predicted,
        )

    def _recall_of(self, read_last: bool) -> float:
        """Return recall of late; until it was tried, every expert is taken to be foreseen."""
        recall = self._recall[read_last].value
        return 1.0 if recall is None else recall

    def _wait_s(self, rows: int, fills: float, *, prefetched: bool) -> float:
        """Return how long a verification of ``rows`` tokens waits for the link, by the model.

        No prediction is in vain here: ``fills`` of iterations count what was moved for those.
        """
        due = self._deadlines(rows - 1, rows)
        waits = self._waits(due, fills, read_last=False, predicted=1.0)
        return min(waits) if prefetched else waits[0]

    def _with_layer(self, rows: int, compute_s: float) -> dict[int, float]:
        """Return `Costs.layer_s` with another sample at ``rows``.

        What was not measured by iterations yet moves in proportion.
        """
        expected = self.costs.layer_at(rows)
        measured = rows in self._measured_rows
        newest = blend(expected, compute_s, _NEWEST) if measured else compute_s
        ratio = newest / expected if expected > 0 else 1.0
        self._measured_rows.add(rows)
        return {
            at: seconds if at in self._measured_rows else seconds * ratio
            for at, seconds in self.costs.layer_s.items()
        } | {rows: newest}

    def _observe_routing(self, rows: int, needed: float, repeated: float) -> None:
        """Learn how alike the choices of neighbouring tokens are.

        From what several tokens need together; or, of single ones, from what each takes over from
        the one before, so that decoding plainly says what drafting would need.
        """
        k, experts = self.shape.experts_per_token, float(self.shape.experts)
        pool = None
        if rows > 1:
            pool = _pool_of(needed / self.shape.layers, k, rows, experts)
        elif self._last_rows == 1:
            pool = min(k * needed / repeated, experts) if repeated else experts
        self._last_rows = rows
        if pool is not None:
            self._pool = blend(self._pool, pool, _NEWEST)

    def _needs(self, rows: int) -> float:
        """Return experts that ``rows`` tokens are expected to need in all layers."""
        return self.shape.layers * _distinct(self._pool, self.shape.experts_per_token, rows)

    def _fills(self, rows: int) -> float:
        """Return how many fills an iteration of ``rows`` rows is expected to need."""
        share = self._fill_share.value
        if share is None:
            everything = self.shape.layers * self.shape.experts * self.costs.expert_bytes
            share = max(0.0, 1 - self.shape.memory_bytes / everything)
        return share * self._needs(rows)

    def _last_token_pays(self, draft_length: int) -> bool:
        """Whether what the draft's last token adds to recall saves more than a draft step."""
        gain = self._recall_of(True) - self._recall_of(False)
        fills = self._fills(draft_length + 1)
        return gain * fills * self.costs.expert_copy_s() > self.costs.draft_s


def _distinct(pool: float, k: int, rows: int) -> float:
    """Return how many of ``pool`` experts are drawn by ``rows`` tokens that draw ``k`` each."""
    return pool * (1 - (1 - k / pool) ** rows)


def _pool_of(distinct: float, k: int, rows: int, experts: float) -> float:
    """Return the pool, from ``k`` to ``experts``, whose `_distinct` is nearest to ``distinct``."""
    low, high = float(k), experts
    for _ in range(30):
        middle = (low + high) / 2
        if _distinct(middle, k, rows) < distinct:
            low = middle
        else:
            high = middle
    return high


def _step_s(iteration: Measured) -> float | None:
    """Return seconds of a draft step; None if there was none that had no backlog to read."""
    passes = iteration.pass_s[1:] if iteration.backlog > SMALL_BACKLOG else iteration.pass_s
    return math.fsum(passes) / len(passes) if passes else None
