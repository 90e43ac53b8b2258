"""Ridge regression of several routers' logits on the states of one layer, a chunk at a time.

Source: Hoerl and Kennard, Technometrics 12(1), 1970.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

# Of the penalty, in units of the mean of what the features' squares sum up to.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

HELD_OUT = 5  # of so many chunks, the first chooses the strength


class RidgeFit:
    """The normal equations: float64 sums over states, so that no text is too long to be held.

    Only the states of the chunks that are held out are kept, until `fit`.

    Args:
        logits: What to fit: of each router, a [tokens, experts] for each chunk.
        chosen: What the routers chose: of each, a [tokens, k] for each chunk.
    """

    def __init__(
        self, logits: Sequence[Sequence[torch.Tensor]], chosen: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        self._logits = logits
        self._chosen = chosen
        self._gram = torch.empty(0)  # [hidden + 1, hidden + 1]
        self._right = torch.empty(0)  # [hidden + 1, routers * experts]
        self._held_out: dict[int, torch.Tensor] = {}  # chunk -> [tokens, hidden + 1]

    def add(self, chunk: int, state: torch.Tensor) -> None:
        """Take in the state of a chunk, [tokens, hidden]."""
        state = nn.functional.pad(state.float().cpu(), (0, 1), value=1.0)
        if chunk % HELD_OUT == 0:
            self._held_out[chunk] = state
        else:
            self._sum(chunk, state)

    def fit(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield each router's weights [hidden + 1, experts], float32, and its held-out recall.

        Each has the strength of the highest recall on the chunks held out, which the trials have
        not seen; the weights are then of all chunks.
        """
        trials = [self._recall(self._solve(strength)) for strength in STRENGTHS]
        for chunk, state in self._held_out.items():
            self._sum(chunk, state)
        recalls = [max(of_router) for of_router in zip(*trials, strict=True)]
        best = [
            of_router.index(recall)
            for of_router, recall in zip(zip(*trials, strict=True), recalls, strict=True)
        ]
        final = {at: self._solve(STRENGTHS[at]) for at in set(best)}
        for router, (at, recall) in enumerate(zip(best, recalls, strict=True)):
            yield final[at][router], recall

    def _sum(self, chunk: int, state: torch.Tensor) -> None:
        state = state.double()
        right = torch.cat([logits[chunk] for logits in self._logits], dim=1).double()
        if not self._gram.numel():
            self._gram = state.new_zeros(state.shape[1], state.shape[1])
            self._right = state.new_zeros(state.shape[1], right.shape[1])
        self._gram.addmm_(state.T, state)
        self._right.addmm_(state.T, right)

    def _solve(self, strength: float) -> tuple[torch.Tensor, ...]:
        penalised = self._gram.clone()
        features = penalised.diagonal()[:-1]  # without the row that is added, which goes free
        features += strength * features.mean()
        solved = torch.cholesky_solve(self._right, torch.linalg.cholesky(penalised))
        return solved.float().chunk(len(self._logits), dim=1)

    def _recall(self, weights: Sequence[torch.Tensor]) -> list[float]:
        """Return the share of each router's choices that are among the weights' top-k."""
        recalls = []
        for matrix, chosen in zip(weights, self._chosen, strict=True):
            found = total = 0
            for chunk, state in self._held_out.items():
                index = chosen[chunk]  # [tokens, k]
                predicted = (state @ matrix).topk(index.shape[1], dim=-1).indices
                found += int((predicted[:, :, None] == index[:, None, :]).sum())
                total += index.numel()
            recalls.append(found / total)
        return recalls
