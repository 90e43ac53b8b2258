"""How far to draft and whether to prefetch: the choice that takes the least time a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from spmoe.decoding.acceptance import Acceptance
from spmoe.decoding.ema import Ema
from spmoe.decoding.prior import Choice

LONGEST = 8  # tokens; a longer draft is rarely accepted whole
_EXPLORE_SHARE = 0.02  # of all time: less than an iteration's time varies
_LEAST_LOSS = 0.02  # of a token's time: an exploration is never free, or it would never stop
_CAUTION = 1.02  # for each token of distance to a measured length: near guesses come first
_NEWEST = 0.2  # weight of an iteration, as in `spmoe.decoding.planner`: its time varies by a tenth


class DraftLength:
    """Learns what an iteration of each choice takes, and makes the choice. One request at a time.

    It keeps the ratio of measured to prior seconds of each choice. A choice that was never measured
    has the ratio of the nearest one, for a prior that is wrong is wrong for both alike.

    An exploration makes another choice than the best: the one with the most iterations since its
    last turn for each second that it is expected to lose. It waits until that loss is at most
    `_EXPLORE_SHARE` of the time since the last exploration.

    Args:
        prior_s: Choice -> expected seconds of an iteration.
    """

    def __init__(self, prior_s: Callable[[Choice], float]) -> None:
        self.acceptance = Acceptance()
        self.count = 0  # iterations
        self._prior_s = cache(lambda choice: max(prior_s(choice), 1e-9))  # 0 s has no ratio
        self._ratios: dict[Choice, Ema] = {}
        self._turns: dict[Choice, int] = {}  # choice -> iterations before its last turn
        self._allowance_s = 0.0  # that explorations may lose
        self._best = Choice(0, prefetch=False)

    def seconds(self, choice: Choice) -> float:
        """Return the expected seconds of an iteration, without the time to read unread tokens."""

        def distance(it: Choice) -> tuple[int, bool]:
            return abs(it.length - choice.length), it.prefetch != choice.prefetch

        nearest = min(self._ratios, key=distance, default=choice)
        ratio = self._ratios[nearest].value if self._ratios else 1.0
        return self._prior_s(choice) * ratio * _CAUTION ** distance(nearest)[0]

    def seconds_per_token(self, choice: Choice) -> float:
        """Return the expected seconds of a token."""
        return self.seconds(choice) / self.acceptance.tokens(choice.length)

    def choose(
        self, choices: Sequence[Choice], *, reading_s: float = 0.0, left: float = math.inf
    ) -> Choice:
        """Return the next iteration's choice.

        A draft takes ``reading_s`` to read its unread tokens first. Half of the tokens that are
        ``left`` to write share that time, since a text may end early.
        """
        share_s = reading_s / max(left / 2, 1.0)
        token_s = {choice: self.seconds_per_token(choice) for choice in choices}
        best = min(choices, key=lambda it: token_s[it] + (share_s if it.length else 0.0))

        def loss_s(it: Choice) -> float:
            more_s = max(token_s[it] - token_s[best], _LEAST_LOSS * token_s[best])
            reads = it.length > 0 and best.length == 0
            return more_s * self.acceptance.tokens(it.length) + (reading_s if reads else 0.0)

        def urgency(it: Choice) -> float:
            return (self.count - self._turns.get(it, 0)) / loss_s(it)

        self._best = chosen = best
        other = max((it for it in choices if it != best), key=urgency, default=best)
        if loss_s(other) <= self._allowance_s:
            self._allowance_s -= loss_s(other)
            chosen = other
        self._turns[chosen] = self.count
        return chosen

    def observe(self, choice: Choice, seconds: float) -> None:
        """Learn what an iteration took, less reading. Its draft may have ended early."""
        self.count += 1
        self._allowance_s += _EXPLORE_SHARE * seconds
        self._ratios.setdefault(choice, Ema(_NEWEST, 1.0)).add(seconds / self._prior_s(choice))

    def worth_another(self, probabilities: Sequence[float]) -> bool:
        """Whether another token after those of ``probabilities`` is expected to pay.

        It takes a token's share of the time by which longer iterations are longer, and it saves a
        token's time if the target accepts it and all before it.
        """
        short, long = (self._best._replace(length=g) for g in (1, max(self._best.length, 2)))
        step_s = max(0.0, self.seconds(long) - self.seconds(short)) / (long.length - short.length)
        saved_s = self.acceptance.of_another(probabilities) * self.seconds_per_token(self._best)
        return saved_s > step_s
