"""Recall, precision and calibration by hand-computed numbers, and measured on pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_checkpoint
from measure_recall import (
    LAYER_MAP,
    PREVIOUS_LAYER,
    LastRow,
    Text,
    by_token,
    by_verification,
    exchanged_source,
)
from recall import (
    Bucket,
    Recall,
    TokenTally,
    joined_buckets,
    of_scores,
    of_verifications,
    overall,
)
from spmoe.models.experts import attach
from spmoe.models.loading import TargetModel, load_draft, load_target
from spmoe.prediction import layer_map, predictor
from spmoe.prediction.states import STATES
from spmoe.runtime import Runtime

PROMPT = [79, 110, 99, 101, 32, 117, 112, 111, 110]
OTHER = [84, 104, 101, 32, 100, 105, 115, 107]
LAYERS, TOP_K = 3, 3


class TestCounts:
    def test_shares_of_what_was_needed_and_of_what_was_predicted(self) -> None:
        recall = Recall(needed=8, recalled=4, recalled_2k=6, critical=5)
        assert (recall.at_k, recall.at_2k, recall.precision) == (0.5, 0.75, 0.8)
        assert recall.as_dict() == {
            "needed": 8,
            "recalled": 4,
            "recalled_2k": 6,
            "critical": 5,
            "at_k": 0.5,
            "at_2k": 0.75,
            "precision": 0.8,
        }

    def test_without_predictions_there_is_no_share(self) -> None:
        assert (Recall().at_k, Recall().at_2k, Recall().precision) == (None, None, None)

    def test_layers_weigh_by_what_they_needed(self) -> None:
        total = overall([Recall(1, 1, 1, 2), Recall(3, 0, 1, 2)])
        assert total == Recall(4, 1, 2, 4)
        assert total.at_k == 0.25

    def test_the_runtimes_counters(self) -> None:
        layer = {"predicted_accesses": 9, "recalled": 5, "recalled_2k": 7, "critical": 6, "hits": 1}
        assert of_verifications({"layers": [layer]}) == [Recall(9, 5, 7, 6)]

    def test_the_runtimes_calibration(self) -> None:
        assert of_scores([(0.0, 9.5, 0.5), (0.25, 4.0, 1.0)]) == [
            Bucket(0.0, 9.5, 0.5),
            Bucket(0.25, 4.0, 1.0),
        ]


class TestTokens:
    # Two tokens, k = 2 of 6 experts: predicted 0 and 1, then 3 and 2; 2k adds 2, 3 and 0, 1.
    SCORES = torch.tensor(
        [
            [1.50, 1.25, 0.15, 0.08, 0.02, 0.00],
            [0.20, 0.10, 1.20, 1.45, 0.05, 0.00],
        ]
    )

    def test_recall_by_hand(self) -> None:
        tally = TokenTally()
        tally.add(self.SCORES, torch.tensor([[1, 3], [5, 4]]))
        assert tally.recall == Recall(needed=4, recalled=1, recalled_2k=2, critical=4)
        tally.add(self.SCORES, torch.tensor([[1, 0], [3, 2]]))
        assert tally.recall == Recall(needed=8, recalled=5, recalled_2k=6, critical=8)

    def test_calibration_by_hand(self) -> None:
        tally = TokenTally()
        tally.add(self.SCORES, torch.tensor([[1, 3], [3, 0]]))
        assert [bucket.low * 256 for bucket in tally.buckets] == [0, 1, 2, 4, 8, 16, 32, 64, 128]
        assert [bucket.predictions for bucket in tally.buckets] == [2, 0, 0, 1, 1, 2, 3, 2, 1]
        assert [bucket.used for bucket in tally.buckets] == [0, 0, 0, 0, 0, 1, 1, 2, 0]

    def test_a_2k_past_the_experts_is_all_of_them(self) -> None:
        tally = TokenTally()
        tally.add(torch.tensor([[1.6, 1.3, 0.1]]), torch.tensor([[0, 2]]))
        assert tally.recall == Recall(needed=2, recalled=1, recalled_2k=2, critical=2)

    def test_layers_join(self) -> None:
        one, other = TokenTally(), TokenTally()
        one.add(torch.tensor([[1.95, 0.05]]), torch.tensor([[0]]))
        other.add(torch.tensor([[1.95, 0.05]]), torch.tensor([[1]]))
        joined = joined_buckets([one, other])
        assert joined[4] == Bucket(1 / 32, 2, 1)
        assert joined[8] == Bucket(1 / 2, 2, 1)


@dataclass
class Case:
    target: TargetModel
    runtime: Runtime
    draft: Any


def open_case(path: Path, draft: Path) -> Case:
    target = load_target(path)
    runtime = Runtime(
        target.store,
        expert_memory="100%",
        experts_per_token=target.experts_per_token,
        activation=target.activation.name,
    )
    attach(target, runtime)
    return Case(target, runtime, load_draft(draft))


@pytest.fixture
def own(target_path: Path) -> Iterator[Case]:
    """A target and itself as the draft."""
    case = open_case(target_path, target_path)
    with case.runtime:
        yield case


class TestByToken:
    def test_a_draft_that_is_the_target_is_always_right(self, own: Case) -> None:
        found = by_token(own.target, own.draft, [Text([*PROMPT, *OTHER], 3), Text(OTHER)])
        assert set(found) == {*STATES, PREVIOUS_LAYER}
        needed = (len(PROMPT) + len(OTHER) - 3 + len(OTHER)) * TOP_K
        for state in ("residual", "mlp-input"):
            for tally in found[state]:
                assert tally.recall == Recall(needed, needed, needed, needed)
                experts = own.target.store.expert_count
                assert sum(b.predictions for b in tally.buckets) == needed // TOP_K * experts
                assert sum(b.used for b in tally.buckets) == needed
        assert overall(tally.recall for tally in found["attention"]).at_k < 0.9
        assert found[PREVIOUS_LAYER][0].recall == Recall()
        assert found[PREVIOUS_LAYER][1].recall.needed == needed

    def test_the_more_is_exchanged_the_less_is_recalled(self, own: Case) -> None:
        shares = (0.0, 0.5, 1.0)
        found = by_token(own.target, own.draft, [Text([*PROMPT, *OTHER])], exchanged=shares)
        none, half, all_of_it = (
            overall(tally.recall for tally in found[exchanged_source(share)]).at_k
            for share in shares
        )
        assert none == 1.0
        chance = TOP_K / own.target.store.expert_count
        assert 1 > half > all_of_it > chance / 2

    def test_the_truth_is_what_the_experts_are_asked_for(self, tmp_path: Path) -> None:
        """Against the runtime's own record, with a draft that is wrong: another seed's model."""
        paths = [
            make_checkpoint("qwen3_moe", tmp_path / str(seed), seed=seed, with_tokenizer=False)
            for seed in (0, 1)
        ]
        case = open_case(*paths)
        with case.runtime:
            predicted: dict[int, set[int]] = {}

            def keep(layer: int, scores: torch.Tensor) -> None:
                predicted[layer] = set(scores.topk(TOP_K).indices.tolist())

            with predictor.draft_predictions(case.target, case.draft, keep):
                case.draft(torch.tensor([PROMPT[:1]]))
            case.runtime.record_routing()
            found = by_token(case.target, case.draft, [Text(PROMPT[:1])])
            record = case.runtime.recorded_routing()
        assert len(record) == LAYERS
        for layer, experts in record:
            right = len(predicted[layer] & set(experts))
            assert found["residual"][layer].recall.recalled == right
        assert 0 < overall(tally.recall for tally in found["residual"]).at_k < 1

    def test_an_unequal_draft_is_measured_through_its_map(
        self, own: Case, draft_path: Path
    ) -> None:
        draft = load_draft(draft_path)
        assert set(by_token(own.target, draft, [Text(PROMPT)])) == {PREVIOUS_LAYER}
        fitted = layer_map.fit(own.target, draft, [PROMPT * 4, OTHER * 4])
        found = by_token(own.target, draft, [Text(PROMPT)], layer_map=fitted)
        assert set(found) == {LAYER_MAP, PREVIOUS_LAYER}
        assert overall(tally.recall for tally in found[LAYER_MAP]).needed == len(PROMPT) * 9


class TestByVerification:
    @pytest.mark.parametrize("last_row", ["nobody", "draft", "target"])
    def test_only_a_row_that_nobody_predicts_is_missed(self, own: Case, last_row: LastRow) -> None:
        texts = by_verification(
            own.target,
            own.draft,
            own.runtime,
            [PROMPT, OTHER],
            max_new_tokens=11,
            last_row=last_row,
        )
        assert [(len(text.token_ids), text.first) for text in texts] == [(20, 9), (19, 8)]
        layers = of_verifications(own.runtime.stats())
        assert all(layer.needed for layer in layers)
        if last_row == "draft":
            for layer in layers:
                assert layer == Recall(layer.needed, layer.needed, layer.needed, layer.needed)
        else:
            assert overall(layers).at_k < 1
        if last_row == "nobody":
            # The predictions of the draft of its own rows came true, as it is the target.
            assert overall(layers).precision == 1

    def test_they_write_the_targets_own_text(self, own: Case) -> None:
        predicted, others = (
            by_verification(
                own.target,
                own.draft,
                own.runtime,
                [PROMPT],
                max_new_tokens=9,
                draft_length=draft_length,
            )
            for draft_length in (4, 0)
        )
        assert predicted == others
