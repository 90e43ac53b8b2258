"""Predictions: when they come, what they say, and that they never change the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import spmoe
from families import FAMILIES, make_checkpoint
from spmoe.config import MAX_ROWS
from spmoe.models.cache_support import cached
from spmoe.models.cached import CachedCausalLM
from spmoe.models.experts import attach
from spmoe.models.loading import TargetModel, load_draft, load_plain, load_target
from spmoe.policies import EVICTIONS, POLICIES, traits_of
from spmoe.prediction import predictor
from spmoe.prediction.routers import routers
from spmoe.runtime import Runtime

PROMPT = [79, 110, 99, 101, 32, 117, 112, 111, 110]
TEXT = [32, 97, 32, 116]
NEW_TOKENS = 16


@dataclass
class Reports:
    """Reports of a predictor, in order."""

    layers: list[int] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, layer: int, scores: torch.Tensor) -> None:
        self.layers.append(layer)
        self.scores.append(scores)


@dataclass
class Pair:
    """A target that has read the prompt, and itself, experts and all, as its draft."""

    target: TargetModel
    runtime: Runtime
    draft: Any

    def readers(self) -> tuple[CachedCausalLM, CachedCausalLM]:
        """Target and draft behind the prompt."""
        both = cached(self.target.model), cached(self.draft)
        for reader in both:
            reader.read(PROMPT)
        return both

    def routing(self, read: Callable[[], object]) -> list[tuple[int, list[int]]]:
        """Return the routing of the target meanwhile: the runtime's own record."""
        self.runtime.record_routing()
        read()
        self.runtime.record_routing(False)
        return self.runtime.recorded_routing()

    @property
    def layers(self) -> list[int]:
        return [*range(len(self.target.moe_layers))]


def open_pair(path: Path) -> Pair:
    target = load_target(path)
    runtime = target.open_runtime(expert_memory="100%")
    attach(target, runtime)
    return Pair(target, runtime, load_draft(path))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    pair = open_pair(make_checkpoint(request.param, tmp_path_factory.mktemp(request.param)))
    yield pair
    pair.runtime.close()


@pytest.fixture(scope="module")
def qwen(target_path: Path) -> Iterator[Pair]:
    pair = open_pair(target_path)
    yield pair
    pair.runtime.close()


def hook_count(*models: Any) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for model in models
        for module in model.modules()
    )


def chosen(scores: torch.Tensor) -> list[int]:
    """Experts that the router selects for one token: they have a 1 more than their probability."""
    return (scores >= 1).nonzero().flatten().tolist()


class TestDraft:
    @pytest.mark.parametrize("state", ["residual", "mlp-input"])
    def test_a_draft_that_is_the_target_predicts_every_expert(self, pair: Pair, state: str) -> None:
        target, draft = pair.readers()
        for token in TEXT:
            reports = Reports()
            with predictor.draft_predictions(pair.target, pair.draft, reports, state=state):
                draft.read([token])
            needed = pair.routing(lambda token=token: target.read([token]))
            assert [
                (layer, chosen(scores))
                for layer, scores in zip(reports.layers, reports.scores, strict=True)
            ] == [(layer, sorted(experts)) for layer, experts in needed]

    @pytest.mark.parametrize("state", predictor.STATES)
    def test_a_token_read_is_reported_once_a_layer_in_order(self, pair: Pair, state: str) -> None:
        _, draft = pair.readers()
        reports = Reports()
        with predictor.draft_predictions(pair.target, pair.draft, reports, state=state):
            for token in TEXT:
                draft.read([token])
        assert reports.layers == pair.layers * len(TEXT)
        for scores in reports.scores:
            assert scores.shape == (pair.target.store.expert_count,)
            assert scores.dtype == torch.float32
            assert not scores.requires_grad
            # Probabilities add up to one; each of k selected experts has one more.
            assert scores.min() >= 0
            assert float(scores.sum()) == pytest.approx(1 + pair.target.experts_per_token, abs=1e-4)
            assert len(chosen(scores)) == pair.target.experts_per_token

    def test_of_several_tokens_only_the_last_is_reported(self, qwen: Pair) -> None:
        one_by_one, at_once = Reports(), Reports()
        _, draft = qwen.readers()
        with predictor.draft_predictions(qwen.target, qwen.draft, one_by_one):
            for token in TEXT:
                draft.read([token])
        _, draft = qwen.readers()
        with predictor.draft_predictions(qwen.target, qwen.draft, at_once):
            draft.read(TEXT)
        assert at_once.layers == qwen.layers
        for found, expected in zip(
            at_once.scores, one_by_one.scores[-len(qwen.layers) :], strict=True
        ):
            torch.testing.assert_close(found, expected)

    def test_hooks_of_others_see_no_prediction(self, pair: Pair) -> None:
        """A hook that fired would make a predictor be compared with itself."""
        _, draft = pair.readers()
        seen: list[str] = []
        with ExitStack() as hooks:
            for layer, router in zip(pair.target.moe_layers, routers(pair.target), strict=True):
                for module in (layer.gate, router.norm, layer.experts):
                    hook = module.register_forward_hook(
                        lambda module, *_: seen.append(type(module).__name__)
                    )
                    hooks.callback(hook.remove)
            with predictor.draft_predictions(pair.target, pair.draft, Reports()):
                draft.read(TEXT[:1])
        assert seen == []

    @pytest.mark.parametrize("state", predictor.STATES)
    def test_its_hooks_go_when_it_ends_and_when_it_fails(self, qwen: Pair, state: str) -> None:
        before = hook_count(qwen.target.model, qwen.draft)
        with predictor.draft_predictions(qwen.target, qwen.draft, Reports(), state=state):
            assert hook_count(qwen.draft) == len(qwen.layers)
        assert hook_count(qwen.target.model, qwen.draft) == before

        def fail(layer: int, scores: torch.Tensor) -> None:
            raise KeyError(layer)

        _, draft = qwen.readers()
        with (
            pytest.raises(KeyError),
            predictor.draft_predictions(qwen.target, qwen.draft, fail, state=state),
        ):
            draft.read(TEXT)
        assert hook_count(qwen.target.model, qwen.draft) == before

    def test_predictions_leave_the_drafts_logits_as_they_are(self, pair: Pair) -> None:
        _, alone = pair.readers()
        _, watched = pair.readers()
        with predictor.draft_predictions(pair.target, pair.draft, Reports()):
            assert torch.equal(watched.read(TEXT, last=4), alone.read(TEXT, last=4))

    def test_a_state_that_does_not_exist_is_refused_with_those_that_do(self, qwen: Pair) -> None:
        with (
            pytest.raises(
                spmoe.InvalidArgument,
                match='"logits" is not one of residual, mlp-input, attention',
            ),
            predictor.draft_predictions(qwen.target, qwen.draft, Reports(), state="logits"),
        ):
            pass

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"num_hidden_layers": 2}, "the draft has layers 2, the target 3"),
            ({"hidden_size": 32}, "the draft has hidden size 32, the target 64"),
        ],
    )
    def test_a_draft_of_another_shape_is_refused_with_the_reason(
        self,
        qwen: Pair,
        changed: dict[str, int],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name, value in changed.items():
            monkeypatch.setattr(qwen.draft.config, name, value)
        assert predictor.draft_mismatch(qwen.target, qwen.draft) == message
        with (
            pytest.raises(spmoe.InvalidArgument, match=f"{message}: its layers cannot stand"),
            predictor.draft_predictions(qwen.target, qwen.draft, Reports()),
        ):
            pass
        assert hook_count(qwen.draft) == 0

    def test_a_draft_of_the_same_shape_is_not_refused(self, pair: Pair) -> None:
        assert predictor.draft_mismatch(pair.target, pair.draft) is None


class TestTarget:
    def test_each_layer_predicts_for_the_next_one(self, pair: Pair) -> None:
        target, _ = pair.readers()
        reports = Reports()
        with predictor.target_predictions(pair.target, reports):
            target.read(TEXT)
        assert reports.layers == pair.layers[1:]
        for scores in reports.scores:
            k = pair.target.experts_per_token
            assert float(scores.sum()) == pytest.approx(len(TEXT) * (1 + k), abs=1e-3)

    def test_a_prompt_is_left_alone(self, qwen: Pair) -> None:
        reports = Reports()
        prompt, verification = (cached(qwen.target.model) for _ in range(2))
        with predictor.target_predictions(qwen.target, reports):
            prompt.read([65] * (MAX_ROWS + 1))
            assert reports.layers == []
            verification.read([65] * MAX_ROWS)
            assert reports.layers == qwen.layers[1:]

    @pytest.mark.parametrize("first", range(6))
    def test_rows_before_the_first_are_left_out(self, qwen: Pair, first: int) -> None:
        target, _ = qwen.readers()
        reports = Reports()
        with predictor.target_predictions(qwen.target, reports, first_row=lambda: first):
            target.read(TEXT)
        rows = max(0, len(TEXT) - first)
        assert reports.layers == (qwen.layers[1:] if rows else [])
        for scores in reports.scores:
            k = qwen.target.experts_per_token
            assert float(scores.sum()) == pytest.approx(rows * (1 + k), abs=1e-3)

    def test_its_hooks_go_when_it_ends(self, pair: Pair) -> None:
        before = hook_count(pair.target.model)
        with predictor.target_predictions(pair.target, Reports()):
            assert hook_count(pair.target.model) == before + len(pair.layers) - 1
        assert hook_count(pair.target.model) == before

    def test_the_target_computes_the_same_and_its_gates_fire_once_a_pass(self, pair: Pair) -> None:
        alone, _ = pair.readers()
        watched, _ = pair.readers()
        routers(pair.target)  # finds them by passes of its own
        expected = alone.read(TEXT, last=4)
        fired: list[int] = []
        with ExitStack() as hooks:
            for ordinal, layer in enumerate(pair.target.moe_layers):
                hook = layer.gate.register_forward_hook(
                    lambda *_, ordinal=ordinal: fired.append(ordinal)
                )
                hooks.callback(hook.remove)
            with predictor.target_predictions(pair.target, Reports()):
                assert torch.equal(watched.read(TEXT, last=4), expected)
        assert fired == pair.layers


def test_a_layer_without_a_norm_or_gate_is_refused_with_the_cure(qwen: Pair) -> None:
    @dataclass
    class Layer:
        path: str
        number: int
        gate: None = None

    @dataclass
    class Target:
        model: Any
        moe_layers: Sequence[Layer]

    place = qwen.target.moe_layers[1]
    target = Target(qwen.target.model, [Layer(place.path, place.number)])
    with pytest.raises(spmoe.InvalidArgument, match=r'layer 1 .* no gate.*policy="on-demand"'):
        routers(target)


@pytest.fixture(scope="module")
def expected(target_path: Path) -> list[int]:
    ids = torch.tensor([PROMPT])
    text = load_plain(target_path).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
    )
    return text[0, len(PROMPT) :].tolist()


class TestTextStaysTheTargets:
    """Every policy, with predictions true, false, and not numbers at all."""

    @pytest.fixture(autouse=True, params=["true", "nan", "reversed"])
    def predictions(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        spoil = {
            "true": lambda scores: scores,
            "nan": lambda scores: torch.full_like(scores, torch.nan),
            "reversed": lambda scores: -1e30 * scores,
        }[request.param]
        predict = Runtime.predict

        def spoilt(self: Runtime, layer: int, scores: torch.Tensor, **source: Any) -> None:
            predict(self, layer, spoil(scores), **source)

        monkeypatch.setattr(Runtime, "predict", spoilt)

    @staticmethod
    def write(engine: spmoe.Engine, draft_length: int) -> list[int]:
        iterations = engine.iterate(PROMPT, max_new_tokens=NEW_TOKENS, draft_length=draft_length)
        return [token for iteration in iterations for token in iteration.tokens]

    @pytest.mark.parametrize("policy", [name for name in POLICIES if not traits_of(name).replays])
    def test_under_every_policy(
        self, target_path: Path, draft_path: Path, expected: list[int], policy: str
    ) -> None:
        for draft in (target_path, draft_path):
            with spmoe.load(target_path, draft, expert_memory="50%", policy=policy) as engine:
                engine.planner = None  # which would find that nothing pays for models so small
                for draft_length in (0, 1, 4):
                    assert self.write(engine, draft_length) == expected, (draft, draft_length)
                reports = engine.runtime.stats()["predictions"]
                assert (reports > 0) == (bool(engine.runtime.traits.reads))

    @pytest.mark.parametrize("eviction", ["auto", "belady"])
    def test_under_the_oracle_that_is_given_what_is_to_come(
        self, target_path: Path, expected: list[int], eviction: str
    ) -> None:
        assert eviction == "auto" or eviction in EVICTIONS
        with spmoe.load(
            target_path, target_path, expert_memory="50%", policy="on-demand"
        ) as engine:
            engine.runtime.record_routing()
            assert self.write(engine, 4) == expected
            routing = engine.runtime.recorded_routing()
        with spmoe.load(
            target_path, target_path, expert_memory="50%", policy="oracle", eviction=eviction
        ) as engine:
            engine.runtime.replay_routing(routing)
            assert self.write(engine, 4) == expected
            assert engine.runtime.stats()["prefetch_used_bytes"] > 0
            # And when what comes is not what was given.
            engine.runtime.replay_routing(routing[::-1])
            assert self.write(engine, 1) == expected


class TestJoiningTokens:
    def test_scores_add_up(self) -> None:
        scores = torch.tensor([[1.5, 0.3, 0.2], [0.1, 1.6, 0.3]])
        torch.testing.assert_close(predictor.join(scores), torch.tensor([1.6, 1.9, 0.5]))

    def test_what_many_tokens_nearly_select_is_not_selected(self) -> None:
        scores = torch.tensor([[1.45, 0.43, 0.12]] * 9)
        joined = predictor.join(scores)
        assert joined[0] == pytest.approx(9 * 1.45)
        assert joined[1] == 1
        assert joined[2] == 1
