"""What the probability that a draft gives to a token says about its acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_CLASSES = 10  # of probabilities
_OWN_TOKENS = 2  # that the draft's own account of a probability weighs as much as
_FADING = 0.98  # for each token, of what is known of a class


@dataclass(slots=True)
class Confidence:
    """How often a drafted token is accepted, by the probability that the draft gave to it.

    The draft's account of itself is where it begins. A token that the draft chose among many is
    often what the target chooses too, so that acceptance tends to be above it.
    """

    _offered: list[float] = field(default_factory=lambda: [0.0] * _CLASSES)  # by probability
    _accepted: list[float] = field(default_factory=lambda: [0.0] * _CLASSES)  # fading, both

    def acceptance(self, probability: float) -> float:
        """Return the estimated probability that a token is accepted if those before it are."""
        kind = _class_of(probability)
        accepted = self._accepted[kind] + _OWN_TOKENS * probability
        return accepted / (self._offered[kind] + _OWN_TOKENS)

    def observe(self, probabilities: Sequence[float], accepted: int) -> None:
        """Tell how many of the tokens drafted were accepted.

        Args:
            probabilities: That the draft gave to each.
            accepted: Leading ones of them. The one behind was refused; nothing is known of others.
        """
        for place, probability in enumerate(probabilities[: accepted + 1]):
            kind = _class_of(probability)
            self._offered[kind] = _FADING * self._offered[kind] + 1
            self._accepted[kind] = _FADING * self._accepted[kind] + (place < accepted)


def _class_of(probability: float) -> int:
    return min(int(probability * _CLASSES), _CLASSES - 1) if probability > 0 else 0  # or NaN
