"""The map that lets a draft of another shape predict: what it learns, stores and refuses."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spmoe
from families import FAMILIES, make_checkpoint, make_dense_draft
from spmoe.models.cache_support import cached
from spmoe.models.experts import attach
from spmoe.models.loading import TargetModel, load_draft, load_target, load_tokenizer
from spmoe.prediction import layer_map, predictor
from spmoe.prediction.layer_map import LayerMap
from spmoe.runtime import Runtime

PROMPT = [79, 110, 99, 101, 32, 117, 112, 111, 110]
NEW_TOKENS = 16
PAIR = "this pair"


def random_text(seed: int, documents: int = 12, tokens: int = 64) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (documents, tokens), generator=generator).tolist()


TEXT = random_text(1)


def open_target(path: Path, **settings: Any) -> tuple[TargetModel, Runtime]:
    target = load_target(path)
    runtime = Runtime(
        target.store,
        experts_per_token=target.experts_per_token,
        activation=target.activation.name,
        alpha=target.activation.alpha,
        limit=target.activation.limit,
        **({"expert_memory": "100%"} | settings),
    )
    attach(target, runtime)
    return target, runtime


def cut(draft: Any, layers: int) -> Any:
    """Take all but the first layers away."""
    del draft.model.layers[layers:]
    draft.config.num_hidden_layers = layers
    return draft


def widened(draft: Any) -> Any:
    """Return a model of twice the hidden size that computes the same in turned coordinates."""
    hidden = draft.config.hidden_size
    generator = torch.Generator().manual_seed(7)
    turn = torch.linalg.qr(torch.randn(2 * hidden, hidden, generator=generator)).Q.T
    config = copy.deepcopy(draft.config)
    config.hidden_size = 2 * hidden
    wide = type(draft)(config).eval()
    into = (".o_proj.weight", ".down_proj")  # what writes to the residual stream
    with torch.no_grad():
        for name, weight in wide.state_dict().items():
            old = draft.state_dict()[name]
            if name.endswith("layernorm.weight") or name == "model.norm.weight":
                weight.fill_(0.5**0.5)  # the same length over twice the places
            elif weight.shape == old.shape:
                weight.copy_(old)
            else:
                weight.copy_(turn.T @ old if name.endswith(into) else old @ turn)
    return wide


@dataclass
class Case:
    target: TargetModel
    draft: Any
    fitted: LayerMap


@pytest.fixture(scope="module")
def shorter(target_path: Path) -> Iterator[Case]:
    """A target, and its first two layers of three as the draft."""
    target, runtime = open_target(target_path)
    with runtime:
        draft = cut(load_draft(target_path), 2)
        yield Case(target, draft, layer_map.fit(target, draft, TEXT))


@pytest.fixture(scope="module")
def narrower_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft of another depth and width that knows nothing of the target."""
    path = tmp_path_factory.mktemp("narrower")
    return make_dense_draft(path, hidden_size=32, num_hidden_layers=5)


def recall(target: TargetModel, draft: Any, fitted: LayerMap, text: list[int]) -> list[float]:
    """Read token by token; by layer, the share of the runtime's own record that was predicted."""
    target_reader, draft_reader = cached(target.model), cached(draft)
    runtime: Runtime = target.moe_layers[0].experts._spmoe_place[0]
    hits = [0] * len(target.moe_layers)
    for token in text:
        predicted: dict[int, set[int]] = {}

        def keep(layer: int, scores: torch.Tensor, into: dict[int, set[int]] = predicted) -> None:
            into[layer] = set((scores > 1).nonzero().flatten().tolist())

        with predictor.draft_predictions(target, draft, keep, layer_map=fitted):
            draft_reader.read([token])
        runtime.record_routing()
        target_reader.read([token])
        runtime.record_routing(False)
        for layer, experts in runtime.recorded_routing():
            hits[layer] += len(predicted[layer] & set(experts))
    return [count / (len(text) * target.experts_per_token) for count in hits]


class TestFit:
    def test_layers_that_the_draft_shares_are_predicted(self, shorter: Case) -> None:
        """The third is only near; by chance three of eight experts are right three times in 8."""
        assert shorter.fitted.draft_layers == (0, 1, 1)
        found = recall(shorter.target, shorter.draft, shorter.fitted, random_text(2)[0])
        assert min(found[:2]) > 0.95
        assert found[2] > 0.45

    def test_it_says_how_good_it_is_on_text_it_was_not_fitted_on(self, shorter: Case) -> None:
        found = recall(shorter.target, shorter.draft, shorter.fitted, random_text(2)[0])
        assert shorter.fitted.held_out_recall == pytest.approx(found, abs=0.08)

    def test_states_turned_into_another_width_are_turned_back(
        self, shorter: Case, target_path: Path
    ) -> None:
        draft = widened(cut(load_draft(target_path), 2))
        fitted = layer_map.fit(shorter.target, draft, TEXT)
        assert fitted.weights.shape == (3, 129, 8)
        found = recall(shorter.target, draft, fitted, random_text(2)[0])
        assert min(found[:2]) > 0.95

    def test_a_draft_that_knows_nothing_is_as_good_as_chance(
        self, shorter: Case, narrower_path: Path
    ) -> None:
        fitted = layer_map.fit(shorter.target, load_draft(narrower_path), TEXT)
        assert fitted.draft_layers == (0, 2, 4)
        assert max(fitted.held_out_recall) < 0.6

    def test_a_pair_of_equal_shape_maps_one_to_one(self, target_path: Path, shorter: Case) -> None:
        fitted = layer_map.fit(shorter.target, load_draft(target_path), TEXT)
        assert fitted.draft_layers == (0, 1, 2)
        assert min(fitted.held_out_recall) > 0.95

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_can_be_mapped_to(
        self, family: str, tmp_path: Path, draft_path: Path
    ) -> None:
        target, runtime = open_target(make_checkpoint(family, tmp_path, with_tokenizer=False))
        with runtime:
            fitted = layer_map.fit(target, load_draft(draft_path), TEXT[:4])
        assert fitted.weights.shape == (len(target.moe_layers), 65, target.store.expert_count)
        assert fitted.weights.isfinite().all()

    def test_layers_fitted_apart_come_out_the_same(
        self, shorter: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(layer_map, "_GROUP_BYTES", 1)
        apart = layer_map.fit(shorter.target, shorter.draft, TEXT)
        assert torch.equal(apart.weights, shorter.fitted.weights)

    def test_long_documents_are_read_in_chunks(self, shorter: Case) -> None:
        """Both models have a context of 512, and a chunk has no more."""
        long = [token for document in random_text(4, documents=17) for token in document]
        fitted = layer_map.fit(shorter.target, shorter.draft, [long])
        assert fitted.held_out_recall[0] > 0.9

    def test_one_document_is_too_few(self, shorter: Case) -> None:
        with pytest.raises(spmoe.InvalidArgument, match=r"at least two documents .* got 1"):
            layer_map.fit(shorter.target, shorter.draft, TEXT[:1])

    def test_it_leaves_no_hooks(self, shorter: Case) -> None:
        for model in (shorter.target.model, shorter.draft):
            for module in model.modules():
                assert not module._forward_hooks
                assert not module._forward_pre_hooks

    def test_scores_mean_what_a_routers_do(self, shorter: Case) -> None:
        scores = shorter.fitted.scores(0, torch.randn(5, 64))
        assert scores.shape == (5, 8)
        torch.testing.assert_close(scores.sum(dim=1), torch.full((5,), 4.0))
        assert ((scores >= 1).sum(dim=1) == 3).all()


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (4, 4, (0, 1, 2, 3)),
        (4, 1, (0, 0, 0, 0)),
        (4, 2, (0, 0, 1, 1)),
        (2, 8, (2, 6)),
        (3, 2, (0, 1, 1)),
    ],
)
def test_a_layer_is_predicted_by_the_nearest_of_the_draft(
    ours: int, theirs: int, expected: tuple[int, ...]
) -> None:
    def model(depth: int) -> Any:
        return SimpleNamespace(get_decoder=lambda: SimpleNamespace(layers=[None] * depth))

    layers = [SimpleNamespace(number=number) for number in range(ours)]
    target: Any = SimpleNamespace(model=model(ours), moe_layers=layers)
    assert layer_map.nearest_layers(target, model(theirs)) == expected


class TestFile:
    def test_what_was_saved_comes_back(self, shorter: Case, tmp_path: Path) -> None:
        shorter.fitted.save(tmp_path / "map", PAIR)
        found = LayerMap.load(tmp_path / "map", PAIR)
        assert torch.equal(found.weights, shorter.fitted.weights)
        assert found.draft_layers == shorter.fitted.draft_layers
        assert found.experts_per_token == 3
        assert found.held_out_recall == pytest.approx(shorter.fitted.held_out_recall)
        assert [path.name for path in tmp_path.iterdir()] == ["map"]

    def test_that_of_another_pair_is_refused(self, shorter: Case, tmp_path: Path) -> None:
        shorter.fitted.save(tmp_path / "map", "another pair")
        message = "stale: it is of pair another pair, this pair is wanted; run `spmoe profile`"
        with pytest.raises(spmoe.InvalidArgument, match=message):
            LayerMap.load(tmp_path / "map", PAIR)

    def test_a_damaged_or_absent_file_is_refused(self, shorter: Case, tmp_path: Path) -> None:
        path = tmp_path / "map"
        with pytest.raises(spmoe.InvalidArgument, match=r"cannot be read .*`spmoe profile`"):
            LayerMap.load(path, PAIR)
        shorter.fitted.save(path, PAIR)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(spmoe.InvalidArgument, match=r"cannot be read .*`spmoe profile`"):
            LayerMap.load(path, PAIR)

    def test_layers_without_weights_are_refused(self, shorter: Case, tmp_path: Path) -> None:
        fitted = shorter.fitted
        broken = LayerMap(fitted.draft_layers, fitted.weights[:2], 3, fitted.held_out_recall)
        broken.save(tmp_path / "map", PAIR)
        with pytest.raises(
            spmoe.InvalidArgument, match=r"damaged \(weights \[2, 65, 8\] .* for \[3\]"
        ):
            LayerMap.load(tmp_path / "map", PAIR)

    def test_a_write_that_fails_leaves_the_old_file(
        self, shorter: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "map"
        shorter.fitted.save(path, PAIR)

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            shorter.fitted.save(path, "another pair")
        LayerMap.load(path, PAIR)
        assert [entry.name for entry in tmp_path.iterdir()] == ["map"]


class TestPrediction:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"draft_layers": (0, 0, 0)}, r"for draft layers \[0, 0, 0\], this .* \[0, 1, 1\]"),
            ({"weights": torch.zeros(3, 33, 8)}, "for draft hidden size 32, this pair has 64"),
            ({"weights": torch.zeros(3, 65, 16)}, "for experts 16, this pair has 8"),
            ({"experts_per_token": 2}, "for experts per token 2, this pair has 3"),
        ],
    )
    def test_a_map_of_another_shape_is_refused(
        self, shorter: Case, changed: dict[str, Any], message: str
    ) -> None:
        fitted = shorter.fitted
        values = {
            "draft_layers": fitted.draft_layers,
            "weights": fitted.weights,
            "experts_per_token": 3,
            "held_out_recall": fitted.held_out_recall,
        }
        with (
            pytest.raises(spmoe.InvalidArgument, match=f"stale: it was fitted {message}; run"),
            predictor.draft_predictions(
                shorter.target,
                shorter.draft,
                lambda *_: None,
                layer_map=LayerMap(**(values | changed)),
            ),
        ):
            pass

    def test_of_several_tokens_only_the_last_is_reported(self, shorter: Case) -> None:
        predicted: list[tuple[int, torch.Tensor]] = []

        def keep(layer: int, scores: torch.Tensor) -> None:
            predicted.append((layer, scores))

        # Outside, since the first use of a model tries its cache, by passes of other tokens.
        whole, single = cached(shorter.draft), cached(shorter.draft)
        with predictor.draft_predictions(
            shorter.target, shorter.draft, keep, layer_map=shorter.fitted
        ):
            whole.read(PROMPT)
            for token in PROMPT:
                single.read([token])
        assert [layer for layer, _ in predicted[:3]] == [0, 1, 2]
        for (_, at_once), (_, one_by_one) in zip(predicted[:3], predicted[-3:], strict=True):
            torch.testing.assert_close(at_once, one_by_one)


class TestEngine:
    """Drafts of another shape than the target's: one-layer, and narrow but deep."""

    @pytest.fixture(params=["shallower", "narrower"])
    def unequal(self, request: pytest.FixtureRequest, draft_path: Path, narrower_path: Path) -> Any:
        return load_draft(draft_path if request.param == "shallower" else narrower_path)

    @pytest.fixture
    def sources(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Of each prediction that reaches the runtime."""
        seen: list[str] = []
        predict = Runtime.predict

        def spy(self: Runtime, layer: int, scores: torch.Tensor, *, source: Any) -> None:
            seen.append(source)
            predict(self, layer, scores, source=source)

        monkeypatch.setattr(Runtime, "predict", spy)
        return seen

    @staticmethod
    def write(engine: spmoe.Engine, draft_length: int) -> list[int]:
        iterations = engine.iterate(PROMPT, max_new_tokens=NEW_TOKENS, draft_length=draft_length)
        return [token for iteration in iterations for token in iteration.tokens]

    @pytest.mark.parametrize("policy", ["sp-moe", "horizon"])
    def test_with_a_map_the_draft_predicts_and_the_text_stays(
        self, target_path: Path, unequal: Any, sources: list[str], policy: str
    ) -> None:
        target, runtime = open_target(target_path, policy=policy, expert_memory="50%")
        fitted = layer_map.fit(target, unequal, TEXT[:4])
        tokenizer = load_tokenizer(target_path)
        with spmoe.Engine(target, tokenizer, runtime, draft=unequal, layer_map=fitted) as engine:
            expected = self.write(engine, 0)
            sources.clear()
            before = runtime.stats()["predictions"]
            assert self.write(engine, 4) == expected
            assert sources.count("draft") >= 3 * 4
            assert runtime.stats()["predictions"] - before == len(sources)
            assert runtime.stats()["predicted_accesses"] > 0

    def test_without_a_map_the_target_predicts_and_the_log_says_why(
        self,
        target_path: Path,
        unequal: Any,
        sources: list[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        target, runtime = open_target(target_path, policy="horizon", expert_memory="50%")
        shape = r"the draft has (layers|hidden size) \d+, the target \d+"
        with (
            caplog.at_level(logging.WARNING, "spmoe"),
            spmoe.Engine(target, load_tokenizer(target_path), runtime, draft=unequal) as engine,
        ):
            (record,) = caplog.records
            pattern = rf"\({shape}: .* `spmoe profile` to fit one\): .* inside the target instead"
            assert re.search(pattern, record.getMessage())
            self.write(engine, 4)
        # They come from inside the target, whose hooks stand for the draft's.
        assert sources
        assert runtime.stats()["layers"][0]["predictions"] == 0

    def test_a_draft_of_equal_shape_needs_no_map(
        self, target_path: Path, shorter: Case, caplog: pytest.LogCaptureFixture
    ) -> None:
        target, runtime = open_target(target_path, policy="horizon", expert_memory="50%")
        tokenizer = load_tokenizer(target_path)
        draft = load_draft(target_path)
        with spmoe.Engine(
            target, tokenizer, runtime, draft=draft, layer_map=shorter.fitted
        ) as engine:
            self.write(engine, 4)
        assert not caplog.records
        assert runtime.stats()["layers"][0]["predictions"] > 0

    def test_a_stale_map_is_refused(self, target_path: Path, shorter: Case, unequal: Any) -> None:
        target, runtime = open_target(target_path, policy="horizon", expert_memory="50%")
        tokenizer = load_tokenizer(target_path)
        with runtime, pytest.raises(spmoe.InvalidArgument, match=r"stale.*`spmoe profile` again"):
            spmoe.Engine(target, tokenizer, runtime, draft=unequal, layer_map=shorter.fitted)
