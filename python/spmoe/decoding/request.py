"""`Request`: the decoding of one text, with the state that belongs to it alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from spmoe.decoding import speculative
from spmoe.decoding.cached_model import CachedModel
from spmoe.decoding.draft_length import LONGEST
from spmoe.decoding.planner import Plan, Planner
from spmoe.models.cache_support import cached
from spmoe.models.cached import CausalLM
from spmoe.models.loading import TargetModel
from spmoe.models.processors import request_processors
from spmoe.reporting.counters import Counters
from spmoe.reporting.trace import Phase
from spmoe.runtime import Runtime
from spmoe.system.closeable import at_work

log = logging.getLogger("spmoe")


class Request:
    """The decoding of one text. One thread at a time, and one request of a runtime at a time.

    Args:
        target: With ``runtime`` attached.
        draft: Proposes tokens; None decodes plainly.
        runtime: Of the target's experts.
        draft_length: Tokens drafted an iteration; None: ``planner`` chooses each time.
        planner: Plans each iteration and learns from it; None: everything may be prefetched.
        cutoff_layer: In place of the planner's.
        prompt_chunk: Tokens of a pass over the prompt; None: all in one.

    Attributes:
        phases: Draft and verification of each iteration, if the runtime keeps spans.
    """

    def __init__(
        self,
        target: TargetModel,
        draft: CausalLM | None,
        runtime: Runtime,
        *,
        draft_length: int | None = 0,
        planner: Planner | None = None,
        cutoff_layer: int | None = None,
        prompt_chunk: int | None = None,
    ) -> None:
        self.phases: list[Phase] = []
        self._target = target
        self._draft = draft if draft_length != 0 else None
        self._runtime = runtime
        self._lengths: Sequence[int] = (0,) if draft is None else (draft_length or 0,)
        if draft is not None and draft_length is None:
            self._lengths = range(LONGEST + 1)
        self._planner = planner
        self._cutoff_layer = cutoff_layer
        self._prompt_chunk = prompt_chunk
        self._plan: Plan | None = None  # of the running iteration
        self._covered_rows = 0  # of the running verification, which the draft predicted for
        self._reread_rows = 0  # before these, which the target has read before

    def iterations(self, tokens: Sequence[int], max_length: int) -> Iterator[speculative.Iteration]:
        """Decode until ``max_length`` tokens of prompt and text; the first one reads the prompt.

        Args:
            tokens: The prompt.
            max_length: No more than the target's context.
        """
        target = cached(self._target.model)
        drafter = cached(self._draft) if self._draft is not None else None
        worth_another = None
        if self._planner is not None and len(self._lengths) > 1:
            worth_another = self._planner.lengths.worth_another
        self._runtime.begin_request()
        counters: Counters | None = None
        finite = True
        iterations = speculative.decode(
            target,
            drafter,
            tokens,
            draft_length=lambda unread, left: self._begin(target, drafter, unread, left),
            max_length=max_length,
            worth_another=worth_another,
            read_last=self._reads_last,
            process=request_processors(self._target.model, tokens, max_length),
            prompt_chunk=self._prompt_chunk,
        )
        for iteration in at_work(iterations):
            self._runtime.end_iteration(iteration.accepted)
            counters = self._observe(iteration, counters)
            self._covered_rows = 0
            if finite and not iteration.finite:
                finite = False
                log.warning("the target's logits are not finite: %s", self._nonfinite_place())
            if self._runtime.trace_spans:
                self.phases += _phases(iteration)
            yield iteration

    def wants(self, layer: int) -> bool:
        """Whether the policy would do anything about a prediction for ``layer`` now."""
        return self._plan is None or self._plan.uses_prediction(self._runtime.traits, layer)

    def cover_row(self) -> None:
        """Note that the draft predicted experts for one more row of the verification to come."""
        self._covered_rows += 1

    @property
    def first_uncovered_row(self) -> int:
        """The first row of the running verification that the draft did not predict for."""
        return self._reread_rows + self._covered_rows if self._covered_rows else 0

    def _begin(
        self, target: CachedModel, drafter: CachedModel | None, unread: int, left: int
    ) -> int:
        """Return how many tokens the coming iteration drafts; set what it may prefetch."""
        if drafter is not None:
            self._reread_rows = unread + drafter.length - target.length
        if self._planner is None:
            return self._lengths[0]
        plan = self._planner.plan(self._lengths, unread=unread, left=left)
        if self._cutoff_layer is not None:
            plan = replace(plan, cutoff_layer=self._cutoff_layer)
        self._plan = plan
        self._runtime.set_limits(
            cutoff_layer=plan.cutoff_layer,
            budget_bytes=plan.budget_bytes,
            break_even=plan.break_even,
        )
        return plan.choice.length

    def _observe(self, iteration: speculative.Iteration, before: Counters | None) -> Counters:
        """Report an iteration to the planner; a prefill, which has none before it, is left out."""
        after = self._runtime.counters()
        if self._planner is not None and self._plan is not None and before is not None:
            self._planner.observe(self._plan, iteration, after - before)
        return after

    def _reads_last(self) -> bool:
        return self._plan is not None and self._plan.read_last

    def _nonfinite_place(self) -> str:
        """Say where weights are not finite, as those of a damaged disk are."""
        cure = "download the checkpoint again, or check the disk"
        for name, weight in self._target.model.named_parameters():
            if not bool(weight.isfinite().all()):
                return f"the weight {name} is not; {cure}"
        if (place := self._runtime.store.find_nonfinite()) is not None:
            layer, expert, file = place
            return f"expert {expert} of MoE layer {layer} is not, in {file}; {cure}"
        return "no weight that was looked at is the cause; the text may be meaningless"


def _phases(iteration: speculative.Iteration) -> list[Phase]:
    verify_s = iteration.end_s - iteration.verify_s
    drafted = f"{iteration.drafted} tokens"
    verified = f"{iteration.accepted} accepted"
    return [
        Phase("draft", drafted, verify_s - iteration.draft_s, verify_s),
        Phase("verify", verified, verify_s, iteration.end_s),
    ]
