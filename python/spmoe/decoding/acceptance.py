"""How often the target accepts a drafted token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spmoe.decoding.ema import Ema

_CLASSES = 10  # of the draft's probabilities: they separate sure from doubtful, and fill soon


class Acceptance:
    """Probability that the target accepts a drafted token if it accepts those before it.

    The priors are weak, since drafts differ: 0.8 for any token, and the draft's own probability for
    a token of that probability. The averages cover some ten iterations of the text, and more of the
    draft's calibration, which changes more slowly.
    """

    def __init__(self) -> None:
        self._all = Ema(1 / 32, 0.8, count=8)
        self._classes = [Ema(1 / 50, (i + 0.5) / _CLASSES, count=2) for i in range(_CLASSES)]

    def tokens(self, length: int) -> float:
        """Return ``A(g) = 1 + a + ... + a^g``, the tokens that drafting g of them writes.

        Source: Leviathan et al., arXiv:2211.17192, section 3.4.
        """
        return math.fsum(self._all.value**place for place in range(length + 1))

    def of_another(self, probabilities: Sequence[float]) -> float:
        """Return the acceptance of all tokens of these probabilities and of one token more."""
        return self._all.value * math.prod(self._class(p).value for p in probabilities)

    def observe(self, drafted: int, accepted: int, probabilities: Sequence[float]) -> None:
        """Learn which drafted tokens were accepted: the leading ones. The next one was refused."""
        for place in range(min(accepted + 1, drafted)):
            self._all.add(place < accepted)
            if place < len(probabilities):
                self._class(probabilities[place]).add(place < accepted)

    def _class(self, probability: float) -> Ema:
        place = int(probability * _CLASSES) if probability > 0 else 0  # NaN is not above 0
        return self._classes[min(place, _CLASSES - 1)]
