"""How far to draft, 0 included: chosen before each iteration from what the last ones cost.

An iteration that drafts ``g`` tokens writes ``A(g)`` of them and takes ``g`` draft steps and a
verification of ``g + 1`` rows; the best ``g`` has the least time a token. What speculation saves
or costs on the link is in the measured times of the verifications.

Source: Leviathan et al., arXiv:2211.17192, section 3.4, for A(g); the costs and the tests are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol


class Measured(Protocol):
    """What an iteration came to; `speculative.Iteration` is one.

    Attributes:
        drafted: Tokens drafted.
        accepted: Of these, accepted.
        draft_steps: Passes of the draft.
        draft_s: Seconds that they took.
        verify_s: Seconds that the verification took.
    """

    @property
    def drafted(self) -> int: ...  # noqa: D102
    @property
    def accepted(self) -> int: ...  # noqa: D102
    @property
    def draft_steps(self) -> int: ...  # noqa: D102
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
class _Line:
    """Least squares through samples (rows, seconds), old ones fading."""

    fade: float
    weight: float = 0.0
    sum_x: float = 0.0
    sum_y: float = 0.0
    sum_xx: float = 0.0
    sum_xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.weight = self.weight * self.fade + 1
        self.sum_x = self.sum_x * self.fade + x
        self.sum_y = self.sum_y * self.fade + y
        self.sum_xx = self.sum_xx * self.fade + x * x
        self.sum_xy = self.sum_xy * self.fade + x * y

    def at(self, x: float) -> float:
        mean_x, mean_y = self.sum_x / self.weight, self.sum_y / self.weight
        spread = self.sum_xx / self.weight - mean_x * mean_x
        if spread < 1e-3:
            return mean_y
        slope = max(0.0, (self.sum_xy / self.weight - mean_x * mean_y) / spread)
        return mean_y + slope * (x - mean_x)


@dataclass(slots=True)
class DraftLength:
    """Chooses the draft length of each iteration. One request at a time.

    Lengths are tried where nothing is known about them, and tried again now and then, less often
    each time that it did not pay. What tests cost is counted, and there are none while it is more
    than `test_share` of all time.

    Attributes:
        longest: Largest length to choose.
        test_share: Share of all time that tests may lose, against the best length known.
    """

    longest: int = 8
    test_share: float = 0.03

    # Newest weigh most; about the last 20 iterations count.
    _verify: _Line = field(default_factory=lambda: _Line(fade=0.95))
    _plain_s: float | None = None  # a verification of one row
    _draft_s: float | None = None  # a draft step
    _offered: float = 2.0  # drafted tokens that were judged, and accepted; fading
    _accepted: float = 1.6
    _total_s: float = 0.0
    _test_loss_s: float = 0.0
    _until_test: int = 0
    _interval: int = 8
    _testing: bool = False
    _count: int = 0

    @property
    def acceptance(self) -> float:
        """Estimated probability that a drafted token is accepted."""
        return min(self._accepted / self._offered, 0.999)

    def seconds_per_token(self, draft_length: int) -> float:
        """Return what a token is expected to cost at this length; needs an iteration of it."""
        if draft_length == 0 and self._plain_s is not None:
            return self._plain_s
        seconds = draft_length * (self._draft_s or 0.0) + self._verify.at(draft_length + 1)
        return seconds / tokens_per_iteration(self.acceptance, draft_length)

    def choose(self) -> int:
        """Return how many tokens to draft in the next iteration."""
        self._testing = False
        if self._draft_s is None:
            return min(4, self.longest)
        if self._plain_s is None:
            return 0
        best = min(range(self.longest + 1), key=self.seconds_per_token)
        affordable = self._test_loss_s <= self.test_share * self._total_s
        if self._until_test > 0 or not affordable:
            return best
        # The other side of the question: does drafting pay at all?
        self._testing = True
        if best > 0:
            return 0
        return min(2, self.longest)

    def observe(self, iteration: Measured) -> None:
        """Tell what an iteration came to."""
        drafted, accepted = iteration.drafted, iteration.accepted
        draft_s, verify_s = iteration.draft_s, iteration.verify_s
        self._count += 1
        self._until_test -= 1
        seconds = draft_s + verify_s
        self._total_s += seconds
        if self._testing:
            others = [g for g in range(self.longest + 1) if (g == 0) != (drafted == 0)]
            usual = min(self.seconds_per_token(g) for g in others)
            loss = seconds - (accepted + 1) * usual
            self._test_loss_s += max(0.0, loss)
            self._interval = 8 if loss < 0 else min(2 * self._interval, 256)
            self._until_test = self._interval
        if drafted == 0:
            self._plain_s = _blend(self._plain_s, verify_s, 0.3)
            if self._until_test <= 0 and not self._testing:
                self._until_test = self._interval
        else:
            step = draft_s / max(iteration.draft_steps, 1)
            self._draft_s = _blend(self._draft_s, step, 0.2)
            judged = min(accepted + 1, drafted)  # nothing is learnt behind the first refusal
            self._offered = 0.95 * self._offered + judged
            self._accepted = 0.95 * self._accepted + accepted
        self._verify.add(drafted + 1, verify_s)

    def worth_another(self, probability: float) -> bool:
        """Whether one more drafted token is expected to pay.

        ``a^g TPOT > t_d + dt_v``: with the probability that it counts, it saves a token's time; it
        costs a draft step and a row more.

        Args:
            probability: That it and all before it are accepted, by the draft's own account.
        """
        if self._draft_s is None or self._plain_s is None:
            return True
        best = min(self.seconds_per_token(g) for g in range(self.longest + 1))
        row_s = max(0.0, self._verify.at(3) - self._verify.at(2))
        return probability * best > self._draft_s + row_s


def _blend(old: float | None, new: float, share: float) -> float:
    return new if old is None else old + share * (new - old)
