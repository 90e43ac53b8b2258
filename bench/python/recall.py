"""How good predictions of experts are: recall, precision, and whether their scores can be believed.

By token, the k experts predicted for it stand against the k that the target's router chose. By
verification, the predictions of all drafted tokens stand against all experts of the target's pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

# Where buckets of probabilities begin: an octave each.
BUCKETS = (0.0, *(2.0**-octave for octave in range(8, 0, -1)))


@dataclass(frozen=True, slots=True)
class Recall:
    """Counts of experts. By token, an expert counts once for each token that uses it.

    Attributes:
        needed: Used where something was predicted.
        recalled: Of these, among the top-k of a prediction.
        recalled_2k: Of these, among the top-2k.
        critical: Among the top-k of those predictions.
    """

    needed: int = 0
    recalled: int = 0
    recalled_2k: int = 0
    critical: int = 0

    def __add__(self, other: Recall) -> Recall:
        return Recall(
            self.needed + other.needed,
            self.recalled + other.recalled,
            self.recalled_2k + other.recalled_2k,
            self.critical + other.critical,
        )

    @property
    def at_k(self) -> float | None:
        """Return the share of what was needed that a top-k held; None if nothing was predicted."""
        return self.recalled / self.needed if self.needed else None

    @property
    def at_2k(self) -> float | None:
        """Return the share of what was needed that a top-2k held."""
        return self.recalled_2k / self.needed if self.needed else None

    @property
    def precision(self) -> float | None:
        """Return the share of the top-k that was needed."""
        return self.recalled / self.critical if self.critical else None

    def as_dict(self) -> dict[str, float | None]:
        """Return counts and shares by name."""
        shares = {"at_k": self.at_k, "at_2k": self.at_2k, "precision": self.precision}
        return asdict(self) | shares


@dataclass(slots=True)
class Bucket:
    """Predictions of about the same score.

    Attributes:
        low: The lowest score; the next bucket's is where it ends.
        predictions: How many, or their weight.
        used: Of these, the expert was used.
    """

    low: float
    predictions: float = 0.0
    used: float = 0.0


def overall(layers: Iterable[Recall]) -> Recall:
    """Return the counts of all layers together."""
    return sum(layers, start=Recall())


def of_verifications(stats: Mapping[str, Any]) -> list[Recall]:
    """Return each layer's counts by verification, from `Runtime.stats`.

    There a top-k is one for each prediction received: joined over the drafted tokens, they may be
    more than k experts.
    """
    return [
        Recall(
            needed=layer["predicted_accesses"],
            recalled=layer["recalled"],
            recalled_2k=layer["recalled_2k"],
            critical=layer["critical"],
        )
        for layer in stats["layers"]
    ]


def of_scores(calibration: Iterable[tuple[float, float, float]]) -> list[Bucket]:
    """Return the calibration of joined scores, from `Runtime.calibration`.

    Older weights decay, so that about the last 200 layers that ran count.
    """
    return [Bucket(*entry) for entry in calibration]


@dataclass(slots=True)
class TokenTally:
    """The results of one source's predictions for one layer, token by token.

    Attributes:
        recall: The counts.
        buckets: Router probability as predicted, against use; one for each of `BUCKETS`.
    """

    recall: Recall = Recall()
    buckets: list[Bucket] = field(default_factory=lambda: [Bucket(low) for low in BUCKETS])

    def add(self, scores: torch.Tensor, chosen: torch.Tensor) -> None:
        """Count predictions against the truth.

        Args:
            scores: [tokens, experts], as `spmoe.prediction.predictor.Router.scores`.
            chosen: [tokens, k], the router's choices.
        """
        tokens, k = chosen.shape
        ranked = scores.topk(min(2 * k, scores.shape[1]), dim=-1).indices
        right = (ranked[:, :, None] == chosen[:, None, :]).any(dim=-1)  # [tokens, 2k]
        self.recall += Recall(tokens * k, int(right[:, :k].sum()), int(right.sum()), tokens * k)
        used = torch.zeros_like(scores).scatter_(1, chosen, 1.0)
        probability = scores - (scores >= 1).to(scores.dtype)  # less the 1 of a selection
        place = torch.bucketize(probability, torch.tensor(BUCKETS[1:]), right=True).flatten()
        predictions = place.bincount(minlength=len(BUCKETS)).tolist()
        uses = place.bincount(weights=used.flatten(), minlength=len(BUCKETS)).tolist()
        for bucket, count, count_used in zip(self.buckets, predictions, uses, strict=True):
            bucket.predictions += count
            bucket.used += count_used


def joined_buckets(tallies: Iterable[TokenTally]) -> list[Bucket]:
    """Return the calibration of all layers together."""
    joined = TokenTally().buckets
    for tally in tallies:
        for into, bucket in zip(joined, tally.buckets, strict=True):
            into.predictions += bucket.predictions
            into.used += bucket.used
    return joined
