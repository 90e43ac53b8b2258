"""Routing that is known ahead: drawn from a statistical model, or recorded from a pair and mapped.

Weights without meaning choose experts without meaning. To measure how a machine moves the experts
of a model whose weights are random, routing, predictions and acceptance are scripted instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmoe.errors import InvalidArgument

Experts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ScriptedIteration:
    """One iteration: the experts of its tokens, and the predictions of them.

    Row 0 is the last token of the text, the rows behind it are drafted. In their experts, place i
    of a row stands for the router's i-th choice, and the prediction of it is at the same place.

    Attributes:
        experts: [rows, layers, k].
        by_draft: [rows - 1, layers, k], predicted by the draft, of all rows but the last.
        by_target: [rows, layers, k], predicted by the layer before.
        accepted: Drafted tokens that the target accepts.
    """

    experts: Experts
    by_draft: Experts
    by_target: Experts
    accepted: int

    @property
    def drafted(self) -> int:
        """Drafted tokens."""
        return len(self.experts) - 1

    def accesses(self) -> Iterator[tuple[int, list[int]]]:
        """Yield (layer, experts) of the verification, in order, as `Runtime.replay_routing`."""
        for layer in range(self.experts.shape[1]):
            yield layer, np.unique(self.experts[:, layer]).tolist()


Request = list[ScriptedIteration]


@dataclass(frozen=True, slots=True)
class RoutingModel:
    """How routing behaves, in a few shares.

    Attributes:
        kept: Of a token's experts, those that the token before used too, in the first and in the
            last layer; in between on a line. Experts that are not kept are equally likely.
        acceptance: Probability that a drafted token is accepted if those before it are.
        draft_recall: Of a token's experts, those that the draft predicts; in place of each other
            one it names one that the token does not use.
        target_recall: The same for the layer before.
    """

    kept: tuple[float, float]
    acceptance: float
    draft_recall: float
    target_recall: float

    def __post_init__(self) -> None:
        """Refuse what is not a share."""
        shares = (*self.kept, self.acceptance, self.draft_recall, self.target_recall)
        if not all(0 <= share <= 1 for share in shares):
            raise InvalidArgument(f"shares of a routing model must be in [0, 1], got {self}")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model that routing uses: MoE layers, experts of each, experts of a token."""

    layers: int
    experts: int
    k: int

    def __post_init__(self) -> None:
        """Refuse a model in which a token could not change all of its experts."""
        if 2 * self.k > self.experts:
            raise InvalidArgument(
                f"scripted routing needs at least twice as many experts as a token uses, got "
                f"{self.experts} and {self.k}"
            )


def draw(
    model: RoutingModel,
    shape: ModelShape,
    *,
    requests: int,
    iterations: int,
    draft_length: int,
    seed: int = 0,
) -> list[Request]:
    """Return requests whose routing is drawn from a statistical model."""
    rng = np.random.default_rng(seed)
    kept = np.linspace(*model.kept, shape.layers)
    script = []
    for _ in range(requests):
        request: Request = []
        before = _first(shape, rng)
        for _ in range(iterations):
            rows = []
            for _ in range(draft_length + 1):
                rows.append(
                    np.array([_next(before[i], kept[i], shape, rng) for i in range(shape.layers)])
                )
                before = rows[-1]
            accepted = 0
            while accepted < draft_length and rng.random() < model.acceptance:
                accepted += 1
            experts = np.array(rows)
            request.append(
                ScriptedIteration(
                    experts,
                    _predict(experts[:-1], model.draft_recall, shape, rng),
                    _predict(experts, model.target_recall, shape, rng),
                    accepted,
                )
            )
            before = rows[accepted]
        script.append(request)
    return script


def map_recording(
    recording: Mapping[str, Any],
    shape: ModelShape,
    *,
    target_recall: float,
    requests: int,
    iterations: int,
    seed: int = 0,
) -> list[Request]:
    """Return requests that route as a recorded pair did, in a model of another shape.

    A layer is the recorded one at the same share of the depth. Each recorded expert stands for a
    group of the model's, all about equal. A token takes as many from the groups of its recorded
    experts, in the router's order, as the model's k needs: the members that the token before took,
    where that used the group too, and otherwise members drawn at random. A wrong
    prediction of the draft becomes an expert that the token does not use. Acceptance is the
    recorded one.

    Args:
        recording: As `bench/python/record_routing.py` writes it.
        shape: Of the model.
        target_recall: As for `RoutingModel`: predictions of the layer before are not recorded.
        requests: Of the recording, round and round.
        iterations: Of each request, at most; a recorded request may be shorter.
        seed: Of what is drawn.

    Raises:
        InvalidArgument: The model has fewer experts than the recording.
    """
    bounds = np.arange(recording["experts"] + 1) * shape.experts // recording["experts"]
    groups = [range(*ends) for ends in itertools.pairwise(bounds.tolist())]
    if shape.experts < len(groups):
        raise InvalidArgument(
            f"the recording has {recording['experts']} experts a layer, the model only "
            f"{shape.experts}: record a pair of fewer, or use the statistical model"
        )
    rng = np.random.default_rng(seed)
    script = []
    for recorded in itertools.islice(itertools.cycle(recording["requests"]), requests):
        before: list[dict[int, list[int]]] = [{} for _ in range(shape.layers)]
        request: Request = []
        for iteration in recorded[:iterations]:
            chosen = np.array(iteration["experts"])  # [rows, recorded layers, recorded k]
            predicted = np.array(iteration["by_draft"]).reshape(-1, *chosen.shape[1:])
            depth = chosen.shape[1]
            experts = np.empty((len(chosen), shape.layers, shape.k), dtype=np.int64)
            by_draft = np.empty((len(predicted), shape.layers, shape.k), dtype=np.int64)
            members: list[list[dict[int, list[int]]]] = []
            for row in range(len(chosen)):
                now = []
                for layer in range(shape.layers):
                    used = chosen[row, layer * depth // shape.layers].tolist()
                    last = members[-1][layer] if members else before[layer]
                    now.append(_members(used, last, groups, shape.k, rng))
                    experts[row, layer] = [e for each in now[-1].values() for e in each]
                    if row < len(predicted):
                        named = predicted[row, layer * depth // shape.layers].tolist()
                        right = [e for g, each in now[-1].items() if g in named for e in each]
                        by_draft[row, layer] = _with_errors(experts[row, layer], right, shape, rng)
                members.append(now)
            accepted = int(iteration["accepted"])
            before = members[accepted]
            by_target = _predict(experts, target_recall, shape, rng)
            request.append(ScriptedIteration(experts, by_draft, by_target, accepted))
        script.append(request)
    return script


def _first(shape: ModelShape, rng: np.random.Generator) -> Experts:
    chosen = [rng.permutation(shape.experts)[: shape.k] for _ in range(shape.layers)]
    return np.array(chosen)


def _next(before: Experts, kept: float, shape: ModelShape, rng: np.random.Generator) -> Experts:
    """Return a token's experts in one layer, [k]."""
    new = _others(before, shape, rng)
    return np.where(rng.random(shape.k) < kept, before, new)


def _predict(
    experts: Experts, recall: float, shape: ModelShape, rng: np.random.Generator
) -> Experts:
    """Return ``experts`` [rows, layers, k] with a share exchanged for others."""
    wrong = np.empty_like(experts)
    for place in np.ndindex(experts.shape[:2]):
        wrong[place] = _others(experts[place], shape, rng)
    return np.where(rng.random(experts.shape) < recall, experts, wrong)


def _with_errors(
    experts: Experts, right: Sequence[int], shape: ModelShape, rng: np.random.Generator
) -> Experts:
    return np.where(np.isin(experts, right), experts, _others(experts, shape, rng))


def _others(experts: Experts, shape: ModelShape, rng: np.random.Generator) -> Experts:
    """Return k experts at random that are none of these."""
    free = np.delete(np.arange(shape.experts), experts)
    return rng.permutation(free)[: shape.k]


def _members(
    used: Sequence[int],
    before: Mapping[int, list[int]],
    groups: Sequence[range],
    k: int,
    rng: np.random.Generator,
) -> dict[int, list[int]]:
    """Return recorded expert -> experts of its group that a token uses, k in all."""
    members: dict[int, list[int]] = {}
    left = k
    for number, expert in enumerate(used):
        count = -(-left // (len(used) - number))
        if count > len(groups[expert]):
            raise InvalidArgument(
                f"a recorded expert stands for {len(groups[expert])}, but a token of the model "
                f"would need {count} of them: record a pair whose tokens use a larger share of "
                "the experts, or use the statistical model"
            )
        kept = before.get(expert, [])[:count]
        new = [e for e in rng.permutation(groups[expert]).tolist() if e not in kept]
        if count:
            members[expert] = [*kept, *new[: count - len(kept)]]
        left -= count
    return members
