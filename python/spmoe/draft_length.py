"""How far to draft, 0 included: chosen before each iteration from what the last ones cost.

An iteration that drafts ``g`` tokens writes ``A(g)`` of them and takes ``g`` draft steps and a
verification of ``g + 1`` rows; the best ``g`` has the least time a token. What a verification costs
is what the planner expects, compute and waits for the link, until it was measured often.

Source: Leviathan et al., arXiv:2211.17192, section 3.4, for A(g); the costs and the tests are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from spmoe.confidence import Confidence
from spmoe.fading import FadingMean, blend

_NEWEST = 0.1  # weight of the newest time of a verification
_TRUSTED_TIMES = 8  # measurements that weigh as much as what was expected
_PRIOR_TOKENS = 8.0  # that the acceptance assumed at first weighs as much as
_PRIOR_ACCEPTANCE = 0.8  # assumed at first
SMALL_BACKLOG = 2  # tokens that a pass reads beside its own as fast as that alone


class Measured(Protocol):
    """What an iteration came to; `speculative.Iteration` is one.

    Attributes:
        drafted: Tokens drafted.
        accepted: Of these, accepted.
        probabilities: That the draft gave to each; or none.
        backlog: Tokens that the draft's first pass read beside the one that every pass reads.
        pass_s: Seconds of each pass of the draft that proposed a token.
        draft_s: Seconds of drafting, all that it took.
        verify_s: Seconds that the verification took.
    """

    @property
    def drafted(self) -> int: ...  # noqa: D102
    @property
    def accepted(self) -> int: ...  # noqa: D102
    @property
    def probabilities(self) -> Sequence[float]: ...  # noqa: D102
    @property
    def backlog(self) -> int: ...  # noqa: D102
    @property
    def pass_s(self) -> Sequence[float]: ...  # noqa: D102
    @property
    def draft_s(self) -> float: ...  # noqa: D102
    @property
    def verify_s(self) -> float: ...  # noqa: D102


def tokens_per_iteration(acceptance: float, draft_length: int) -> float:
    """Return ``A(g) = 1 + a + ... + a^g``, tokens that an iteration is expected to write.

    Args:
        acceptance: Probability in [0, 1] that a drafted token is accepted if those before it are.
        draft_length: Tokens drafted.
    """
    return math.fsum(acceptance**i for i in range(draft_length + 1))


@dataclass(slots=True)
class DraftLength:
    """Chooses the draft length of each iteration, of one request after another.

    Now and then another length than the best known is tested: the one that has waited longest for
    its price, which is what such an iteration is expected to lose. What tests lose is counted, and
    a test has to wait while it would take the sum past `test_share` of all time.

    Requests that interleave blur what is learnt of their costs, and no more.

    Attributes:
        expected_s: Rows -> seconds that a verification of so many is expected to take.
        draft_s: Expected seconds of a draft step. What drafting takes beyond its steps, where it
            begins and ends, is learnt.
        token_s: Expected seconds for each token of a backlog that the draft has to read first.
        plain_first: Iterations that decode plainly before any drafts. They show `expected_s` what
            this memory costs, while the draft may never have to read the prompt.
        longest: Largest length to choose.
        test_share: Share of all time that tests may lose, against the best length known.
    """

    expected_s: Callable[[int], float]
    draft_s: float
    token_s: float = 0.0
    plain_first: int = 0
    longest: int = 8
    test_share: float = 0.02

    _verify_s: dict[int, FadingMean] = field(default_factory=dict)  # by rows
    _tried: dict[int, int] = field(default_factory=dict)  # length -> when it was chosen last
    _offered: float = _PRIOR_TOKENS  # drafted tokens that were judged, and accepted; fading
    _accepted: float = _PRIOR_TOKENS * _PRIOR_ACCEPTANCE
    _confidence: Confidence = field(default_factory=Confidence)
    _total_s: float = 0.0
    _test_loss_s: float = 0.0
    _testing: bool = False
    _lead_s: float = 0.0  # of drafting, beyond its steps; may be less than nothing
    _backlog_s: float = 0.0
    _left: float = math.inf
    _count: int = 0

    @property
    def acceptance(self) -> float:
        """Estimated probability that a drafted token is accepted."""
        return min(self._accepted / self._offered, 0.999)

    def seconds_per_token(self, draft_length: int) -> float:
        """Return what a token is expected to cost at this length."""
        draft_s = max(self._lead_s, 0.0) + draft_length * self.draft_s if draft_length else 0.0
        seconds = draft_s + self._verify_at(draft_length + 1)
        return seconds / tokens_per_iteration(self.acceptance, draft_length)

    def choose(self, backlog: int = 0, left: float = math.inf) -> int:
        """Return how many tokens to draft in the next iteration.

        Args:
            backlog: Tokens of the text that the draft has to read before it drafts any.
            left: Tokens that may still be written; about half of them are taken to be.
        """
        self._testing = False
        self._backlog_s = backlog * self.token_s if backlog > SMALL_BACKLOG else 0.0
        self._left = max(left / 2, 1.0)
        if self._count < self.plain_first:
            return 0
        best = self._best()
        usual = self.seconds_per_token(best)

        def price(length: int) -> float:
            loss = max(self.seconds_per_token(length) - usual, 0.02 * usual)  # none is for nothing
            reading_s = self._backlog_s if length and not best else 0.0
            return reading_s + loss * tokens_per_iteration(self.acceptance, length)

        others = [length for length in range(self.longest + 1) if length != best] or [best]
        test = max(others, key=lambda g: (self._count - self._tried.get(g, 0)) / price(g))
        self._testing = self._test_loss_s + price(test) <= self.test_share * self._total_s
        chosen = test if self._testing else best
        self._tried[chosen] = self._count
        return chosen

    def observe(self, iteration: Measured) -> None:
        """Learn from an iteration."""
        drafted = iteration.drafted
        seconds = iteration.draft_s + iteration.verify_s
        if self._testing:
            usual = self.seconds_per_token(self._best())
            loss = seconds - tokens_per_iteration(self.acceptance, drafted) * usual
            self._test_loss_s += max(0.0, loss)
        self._count += 1
        self._total_s += seconds
        self._verify_s.setdefault(drafted + 1, FadingMean(_NEWEST)).add(iteration.verify_s)
        # Acceptance is forgotten while decoding plainly too, so that few tests can revise it.
        if self._offered > _PRIOR_TOKENS:
            self._offered *= 0.97
            self._accepted *= 0.97
        if drafted:
            self._observe_steps(iteration)
            judged = min(iteration.accepted + 1, drafted)  # nothing is learnt behind a refusal
            self._confidence.observe(iteration.probabilities, iteration.accepted)
            self._offered += judged
            self._accepted += iteration.accepted

    def worth_another(self, probabilities: Sequence[float]) -> bool:
        """Whether one more drafted token is expected to pay.

        ``p TPOT > t_d + dt_v``: with the probability p that it is accepted, and all before it, it
        saves a token's time; it costs a draft step and a row more.

        Args:
            probabilities: That the draft gave to each token before it.
        """
        counts = self.acceptance * math.prod(map(self._confidence.acceptance, probabilities))
        best = self._best()
        deep = max(best, 2)
        row_s = max(0.0, (self._verify_at(deep + 1) - self._verify_at(2)) / (deep - 1))
        return counts * self.seconds_per_token(best) > self.draft_s + row_s

    def _best(self) -> int:
        def cost(length: int) -> float:
            reading_s = self._backlog_s / self._left if length else 0.0
            return self.seconds_per_token(length) + reading_s

        return min(range(self.longest + 1), key=cost)

    def _observe_steps(self, iteration: Measured) -> None:
        others = iteration.pass_s[1:]
        reads = iteration.backlog > SMALL_BACKLOG
        # A single step cannot be told from the lead: both move.
        for step_s in others if others or reads else [iteration.draft_s - self._lead_s]:
            self.draft_s = blend(self.draft_s, step_s, 0.1)
        lead_s = iteration.draft_s - math.fsum(others) - self.draft_s
        if reads:
            read_s = max(0.0, lead_s - self._lead_s)
            self.token_s = blend(self.token_s, read_s / iteration.backlog, 0.5)
        else:
            self._lead_s = blend(self._lead_s, lead_s, 0.2)

    def _verify_at(self, rows: int) -> float:
        expected_s = self.expected_s(rows)
        measured = self._verify_s.get(rows)
        if measured is None or measured.value is None:  # another thread is about to add the first
            return expected_s
        trust = measured.count / (measured.count + _TRUSTED_TIMES)
        return blend(expected_s, measured.value, trust)
