"""Plans each iteration, from the profile of the machine and from what iterations measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from spmoe.config import MAX_ROWS
from spmoe.costs.costs import Costs
from spmoe.costs.cutoff import (
    break_even,
    byte_budget,
    cutoff_layer,
    deadlines,
    paper_cutoff_layer,
    waits_s,
)
from spmoe.decoding.draft_length import DraftLength
from spmoe.decoding.ema import Ema
from spmoe.decoding.prior import Choice, Shape, choices, expected_fills, expected_s

if TYPE_CHECKING:
    from spmoe.decoding.speculative import Iteration
    from spmoe.policies import Traits
    from spmoe.reporting.counters import Counters

CutoffRule = Literal["least-wait", "paper"]  # `cutoff_layer`, `paper_cutoff_layer`

PLAIN_FIRST = 3  # iterations of an engine without drafting: they refill what the prompt evicted
_FEW_UNREAD = 2  # tokens: a draft reads so many beside its own in the same time
_NEWEST = 0.2  # weight of an iteration: some five show a change of the text or the machine


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of an iteration. By default it prefetches nothing.

    Attributes:
        choice: Tokens to draft, and whether to prefetch.
        read_last: Whether the draft reads its last token too, in another step, for predictions.
        cutoff_layer: Leading layers that drafting prefetches for.
        budget_bytes: What the link can move until each layer runs; empty: unknown.
        break_even: Probability of use from which a prefetch pays; 1: none does.
    """

    choice: Choice
    read_last: bool = False
    cutoff_layer: int = 0
    budget_bytes: list[int] = field(default_factory=list)
    break_even: float = 1.0

    def uses_prediction(self, policy: Traits, layer: int) -> bool:
        """Whether a policy would do anything about a prediction for a layer."""
        if policy.limited_by == "cutoff_layer":
            return layer < self.cutoff_layer
        return policy.limited_by is None or self.break_even < 1


class Planner:
    """Plans iterations and learns from them. One request at a time.

    Args:
        profile: Costs of this machine.
        shape: Of the target and its expert memory.
        policy: What is prefetched by.
    """

    def __init__(self, profile: Costs, shape: Shape, *, policy: Traits) -> None:
        self.profile, self.shape, self.policy = profile, shape, policy
        self.cutoff_rule: CutoffRule = "least-wait"
        self.lengths = DraftLength(partial(expected_s, profile, shape))
        self._expected_fills = partial(expected_fills, profile, shape)  # of a verification's rows
        self._draft_s = Ema(_NEWEST, profile.draft_s, count=5)
        self._layers = Ema(_NEWEST, 1.0)  # measured over profiled seconds
        self._fills = Ema(_NEWEST, 1.0)  # measured over expected
        self._recall = (Ema(_NEWEST, 1.0), Ema(_NEWEST, 1.0))  # by `Plan.read_last`
        self._predicted = Ema(_NEWEST, 1.0, count=5)  # experts, for each that is needed

    @property
    def costs(self) -> Costs:
        """The profile, with compute as recent iterations measured it."""
        layer_s = {rows: time * self._layers.value for rows, time in self.profile.layer_s.items()}
        return replace(self.profile, draft_s=self._draft_s.value, layer_s=layer_s)

    def plan(self, lengths: Sequence[int], *, unread: int = 0, left: float = math.inf) -> Plan:
        """Return the plan of an iteration that may draft as many tokens as one of ``lengths``.

        The draft reads ``unread`` tokens first, and ``left`` tokens may still be written.
        """
        if 0 in lengths and self.lengths.count < PLAIN_FIRST:
            lengths = (0,)
        reading_s = unread * self.profile.draft_token_s if unread > _FEW_UNREAD else 0.0
        among = choices(self.profile, self.policy, lengths)
        choice = self.lengths.choose(among, reading_s=reading_s, left=left)
        if not choice.prefetch:
            return Plan(choice)
        costs, rows = self.costs, choice.length + 1
        copy_s = costs.expert_copy_s()
        fills = self._fills.value * self._expected_fills(rows)
        gain = self._recall[True].value - self._recall[False].value
        read_last = rows > 1 and gain * fills * copy_s > costs.draft_s  # it saves more than a step
        steps = choice.length + read_last
        due = deadlines(costs, draft_steps=steps, rows=rows, layer_count=self.shape.layers)
        depth = self._cutoff_layer(costs, due, fills, self._recall[read_last].value)
        pays_from = break_even(prefetch_s=costs.prefetch_s, wait_s=copy_s)
        return Plan(choice, read_last, depth, byte_budget(due, costs), pays_from)

    def observe(self, plan: Plan, iteration: Iteration, used: Counters) -> None:
        """Learn from an iteration, not a prefill, during which counters grew by ``used``."""
        if iteration.rows > MAX_ROWS:
            return
        reads = iteration.drafted > 0 and iteration.unread > _FEW_UNREAD
        reading_s = max(0.0, iteration.pass_s[0] - self._draft_s.value) if reads else 0.0
        if steps := iteration.pass_s[reads:]:
            self._draft_s.add(math.fsum(steps) / len(steps))
        done = Choice(iteration.drafted, plan.choice.prefetch)
        self.lengths.observe(done, iteration.draft_s + iteration.verify_s - reading_s)
        self.lengths.acceptance.observe(done.length, iteration.accepted, iteration.probabilities)
        if profiled_s := self.shape.layers * self.profile.layer_at(iteration.rows):
            self._layers.add(max(0.0, iteration.verify_s - used.stall_s) / profiled_s)
        if expected := self._expected_fills(iteration.rows):
            self._fills.add(used.link_bytes / self.profile.expert_bytes / expected)
        if needs := used.predicted_accesses:
            self._recall[plan.read_last].add(used.recalled / needs)
            self._predicted.add(used.critical / needs)

    def _cutoff_layer(self, costs: Costs, due: Sequence[float], fills: float, recall: float) -> int:
        free_bytes, predicted = self.shape.memory_bytes, self._predicted.value
        if self.cutoff_rule == "paper":
            k = self.shape.experts_per_token
            return paper_cutoff_layer(due, k, costs, free_bytes=free_bytes)
        recall, each = min(recall, predicted), [fills / len(due)] * len(due)
        return cutoff_layer(
            waits_s(due, each, costs, free_bytes=free_bytes, recall=recall, predicted=predicted)
        )
