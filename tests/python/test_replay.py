"""Scripted routing is what its model or its recording says, and drives a runtime faithfully."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spmoe
from families import FAMILIES
from replay import Pace, Replay, Tensors, access_all, to_row
from replay_costs import measure_costs
from scripted import ModelShape, Request, RoutingModel, draw, map_recording
from spmoe.costs.costs import Costs
from spmoe.errors import InvalidArgument
from spmoe.runtime import POLICIES, Runtime
from synthetic_checkpoint import write_checkpoint

SHAPE = ModelShape(layers=3, experts=32, k=4)
MODEL = RoutingModel(kept=(0.2, 0.8), acceptance=0.6, draft_recall=0.9, target_recall=0.7)
HOST = Tensors(torch.float32, torch.device("cpu"))


def drawn(shape: ModelShape = SHAPE, model: RoutingModel = MODEL, **changed: Any) -> list[Request]:
    counts = {"requests": 8, "iterations": 60, "draft_length": 4} | changed
    return draw(model, shape, **counts)


def kept(script: list[Request]) -> np.ndarray:
    """Share of experts that a row of a verification kept from the one before, by layer."""
    shares = [
        np.isin(now[layer], last[layer]).mean()
        for request in script
        for iteration in request
        for last, now in zip(iteration.experts[:-1], iteration.experts[1:], strict=True)
        for layer in range(len(now))
    ]
    return np.array(shares).reshape(-1, script[0][0].experts.shape[1]).mean(axis=0)


def recall(script: list[Request], source: str) -> float:
    found = [
        np.isin(named, used).mean()
        for request in script
        for each in request
        for rows, truth in zip(getattr(each, source), each.experts, strict=False)
        for named, used in zip(rows, truth, strict=True)
    ]
    return float(np.mean(found))


def test_a_model_routes_by_its_shares() -> None:
    script = drawn()
    np.testing.assert_allclose(kept(script), [0.2, 0.5, 0.8], atol=0.02)
    assert recall(script, "by_draft") == pytest.approx(0.9, abs=0.01)
    assert recall(script, "by_target") == pytest.approx(0.7, abs=0.01)
    accepted = [each.accepted for request in script for each in request]
    expected = sum(0.6**n for n in range(1, 5))  # of four
    assert np.mean(accepted) == pytest.approx(expected, abs=0.15)


def test_the_token_after_an_iteration_follows_the_last_accepted_one() -> None:
    always = RoutingModel((1.0, 1.0), 0.5, 1.0, 1.0)
    for request in drawn(model=always):
        assert all((each.experts == request[0].experts[0]).all() for each in request)
    never = RoutingModel((0.0, 0.0), 0.5, 1.0, 1.0)
    for request in drawn(model=never):
        for before, after in itertools.pairwise(request):
            last = before.experts[before.accepted]
            assert not any(np.isin(after.experts[0][i], last[i]).any() for i in range(3))


def test_a_row_has_k_distinct_experts_and_as_many_predicted() -> None:
    for each in drawn(requests=1)[0]:
        for rows in (each.experts, each.by_draft, each.by_target):
            assert all(len(set(row)) == 4 for layers in rows for row in layers)
            assert rows.min() >= 0
            assert rows.max() < 32
        assert (each.drafted, len(each.by_draft), len(each.by_target)) == (4, 4, 5)


def test_the_same_seed_draws_the_same() -> None:
    first, again, other = drawn(), drawn(), drawn(seed=1)
    assert (first[0][0].experts == again[0][0].experts).all()
    assert (first[0][0].experts != other[0][0].experts).any()


def test_shares_and_shapes_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"must be in \[0, 1\]"):
        RoutingModel((0.2, 1.2), 0.5, 0.5, 0.5)
    with pytest.raises(InvalidArgument, match="twice as many experts as a token uses, got 7 and 4"):
        ModelShape(1, 7, 4)


def a_recording(*, experts: int = 8, k: int = 2, layers: int = 2) -> dict[str, Any]:
    """Recorded from a model, as if from a pair."""
    script = drawn(ModelShape(layers, experts, k), requests=2, iterations=50)
    return {
        "pair": "made up",
        "experts": experts,
        "requests": [
            [
                {"experts": each.experts.tolist(), "accepted": each.accepted}
                | {"by_draft": each.by_draft.tolist()}
                for each in request
            ]
            for request in script
        ],
    }


def mapped(recording: dict[str, Any], shape: ModelShape, **changed: Any) -> list[Request]:
    counts = {"requests": 2, "iterations": 50, "target_recall": 0.7} | changed
    return map_recording(recording, shape, **counts)


def test_a_recording_of_the_same_shape_is_replayed_as_it_is() -> None:
    recording = a_recording()
    for recorded, request in zip(
        recording["requests"], mapped(recording, ModelShape(2, 8, 2)), strict=True
    ):
        for expected, found in zip(recorded, request, strict=True):
            assert found.experts.tolist() == expected["experts"]
            assert found.accepted == expected["accepted"]
            right = np.array(expected["by_draft"]) == np.array(expected["experts"])[:-1]
            assert (found.by_draft[right] == found.experts[:-1][right]).all()


@pytest.mark.parametrize("shape", [(5, 16, 2), (5, 60, 4), (5, 128, 8), (5, 8, 1), (1, 32, 3)])
def test_a_recording_keeps_its_character_in_another_shape(shape: tuple[int, int, int]) -> None:
    recording = a_recording()
    layers, experts, k = shape
    script = mapped(recording, ModelShape(*shape))
    source = kept(mapped(recording, ModelShape(2, 8, 2)))
    for layer, share in enumerate(kept(script)):
        assert share == pytest.approx(source[layer * 2 // layers], abs=0.06)
    bounds = [group * experts // 8 for group in range(9)]
    for recorded, request in zip(recording["requests"], script, strict=True):
        for expected, found in zip(recorded, request, strict=True):
            for row, chosen in zip(expected["experts"], found.experts, strict=True):
                for layer in range(layers):
                    groups = np.searchsorted(bounds, chosen[layer], side="right") - 1
                    assert set(groups) <= set(row[layer * 2 // layers])
                    assert len(set(chosen[layer])) == k
    if k > 1:
        assert recall(script, "by_draft") == pytest.approx(0.9, abs=0.03)


def test_members_of_a_group_change_when_it_was_left() -> None:
    used = {
        expert
        for request in mapped(a_recording(), ModelShape(2, 128, 8))
        for each in request
        for expert in each.experts[:, 0].ravel().tolist()
    }
    assert len(used) > 100  # not the same few of each group


def test_a_recording_goes_round_and_stops_where_it_is_asked_to() -> None:
    script = mapped(a_recording(), ModelShape(2, 8, 2), requests=5, iterations=3)
    assert [len(request) for request in script] == [3] * 5
    assert (script[0][0].experts == script[4][0].experts).all()


def test_a_recording_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="has 8 experts a layer, the model only 4"):
        mapped(a_recording(), ModelShape(2, 4, 2))
    with pytest.raises(InvalidArgument, match=r"stands for 2, but a token .* would need 4 of them"):
        mapped(a_recording(), ModelShape(2, 16, 8))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("replay") / "model"
    write_checkpoint(path, FAMILIES["mixtral"]())  # 3 layers of 8 experts, 2 a token
    return spmoe.open_store(sorted(path.glob("*.safetensors")))


def open_runtime(store: Any, policy: str, memory: int | str = "50%") -> Runtime:
    return Runtime(store, expert_memory=memory, experts_per_token=2, policy=policy)


def costs(store: Any) -> Costs:
    """Copies are dear and prefetching is free: every policy prefetches what it may."""
    return Costs(draft_s=1.0, layer_s={1: 1.0}, copy_s={1: 1e-6}, expert_bytes=store.blob_bytes)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs_what_the_script_says(store: Any, policy: str) -> None:
    shape = ModelShape(store.layer_count, store.expert_count, 2)
    script = drawn(shape, requests=2, iterations=5)
    needs = [need for request in script for each in request for need in each.accesses()]
    with open_runtime(store, policy) as runtime:
        if policy == "oracle":
            runtime.replay_routing(needs)
        runtime.record_routing()
        replay = Replay(runtime, experts_per_token=2, costs=costs(store), pace=Pace(), tensors=HOST)
        seconds = [s for request in script for s in replay.run(request)]
        assert runtime.recorded_routing() == needs
        stats = runtime.stats(by_layer=False)
        row = to_row(seconds, script, runtime.counters(), peak_gbps=1.0)
    assert stats["iterations"] == len(seconds) == row["iterations"] == 10
    accepted = sum(each.accepted for request in script for each in request)
    assert stats["accepted"] == accepted
    assert row["tokens"] == accepted + 10
    assert (row["recall"] is None) == (policy in ("on-demand", "activation-trace", "oracle"))


@pytest.mark.parametrize(("policy", "source"), [("sp-moe", "draft"), ("next-gate", "target")])
def test_predictions_are_those_of_the_script(store: Any, policy: str, source: str) -> None:
    shape = ModelShape(store.layer_count, store.expert_count, 2)
    each = drawn(shape, requests=1, iterations=1)[0][0]
    heard: list[tuple[int, str, list[int]]] = []
    with open_runtime(store, policy) as runtime:
        runtime.predict = lambda layer, scores, source: heard.append(  # type: ignore[method-assign]
            (layer, source, (scores > 1).nonzero().ravel().tolist())
        )
        replay = Replay(runtime, experts_per_token=2, costs=costs(store), pace=Pace(), tensors=HOST)
        replay.run([each])
    if source == "draft":  # each drafting step reports its token, all layers
        expected = [
            (layer, "draft", sorted(each.by_draft[row, layer].tolist()))
            for row in range(4)
            for layer in range(3)
        ]
    else:  # each layer reports all rows of the next one
        expected = [
            (layer, "target", np.unique(each.by_target[:, layer]).tolist()) for layer in (1, 2)
        ]
    assert heard == expected


def test_horizon_hears_of_the_last_row_from_the_layer_before(store: Any) -> None:
    each = drawn(ModelShape(3, 8, 2), requests=1, iterations=1)[0][0]
    heard: list[tuple[int, list[int]]] = []
    with open_runtime(store, "horizon") as runtime:

        def predict(layer: int, scores: torch.Tensor, *, source: str) -> None:
            if source == "target":
                heard.append((layer, (scores > 1).nonzero().ravel().tolist()))

        runtime.predict = predict  # type: ignore[assignment, method-assign]
        Replay(runtime, experts_per_token=2, costs=costs(store), pace=Pace(), tensors=HOST).run(
            [each]
        )
    assert heard == [(layer, sorted(each.by_target[4, layer].tolist())) for layer in (1, 2)]


def test_costs_are_measured_in_a_pool_of_one_layer(store: Any) -> None:
    with open_runtime(store, "sp-moe", 8 * -(-store.blob_bytes // 256) * 256) as runtime:
        found, peak_gbps = measure_costs(
            runtime, 2, rows=5, pace=Pace(draft_s=2.0, dense_s=3.0), tensors=HOST
        )
        assert access_all(runtime, HOST).link_bytes > 0
    assert peak_gbps > 0
    assert found.draft_s == 2.0
    assert found.layer_at(5) > 3.0
    assert found.expert_copy_s() == pytest.approx(store.blob_bytes / peak_gbps / 1e9)


def test_a_model_of_one_layer_is_refused(tmp_path: Path) -> None:
    config = FAMILIES["mixtral"]()
    config.num_hidden_layers = 1
    write_checkpoint(tmp_path / "model", config)
    one = spmoe.open_store(sorted((tmp_path / "model").glob("*.safetensors")))
    with (
        open_runtime(one, "sp-moe", "100%") as runtime,
        pytest.raises(InvalidArgument, match="give it two layers or more"),
    ):
        measure_costs(runtime, 2, rows=1, pace=Pace(), tensors=HOST)
