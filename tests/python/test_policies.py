"""Policies: what they say of themselves, and those that are written in Python."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spmoe
from families import make_checkpoint
from spmoe.models.loading import load_plain
from spmoe.models.reference import generate_alone
from spmoe.policies import EVICTIONS, POLICIES, Event, Policy, instead, traits_of
from spmoe.runtime import Runtime

ROOT = Path(__file__).parents[2]
NAMES = re.compile(rf"(?<![\w-])({'|'.join((*POLICIES, *EVICTIONS))})(?![\w-])")
PROMPT = [79, 110, 99, 101, 32, 117, 112, 111, 110]
NEW_TOKENS = 12


def strings_of_python(text: str) -> Iterator[str]:
    """String literals that are no docstrings."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if text and id(node) not in docstrings:
            yield node.value


def strings_of_cpp(text: str) -> list[str]:
    code = re.sub(r"//.*|#include .*", "", text)
    return re.findall(r'"((?:[^"\\\n]|\\.)*)"', code)


class TestTheTable:
    def test_no_code_goes_by_the_name_of_a_policy(self) -> None:
        found = []
        for file in [*ROOT.glob("csrc/**/*.[ch]*"), *ROOT.glob("python/spmoe/**/*.py")]:
            if file.stem == "policies":  # where the rows and the defaults are
                continue
            python = file.suffix == ".py"
            strings = (strings_of_python if python else strings_of_cpp)(file.read_text())
            found += [f"{file.relative_to(ROOT)}: {text}" for text in strings if NAMES.search(text)]
        assert not found

    def test_names_in_code_would_be_found(self) -> None:
        python = '"""Of "oracle"."""\nif policy == "sp-moe" or f"{x} lru":\n    pass  # "belady"'
        assert len([text for text in strings_of_python(python) if NAMES.search(text)]) == 2
        cpp = '#include "schedule/oracle.hpp"  // "lfu"\nif (name == "horizon") return "sp-moe-2";'
        assert [text for text in strings_of_cpp(cpp) if NAMES.search(text)] == ["horizon"]

    def test_docs_list_every_policy_with_its_own_eviction(self) -> None:
        text = (ROOT / "docs" / "policies.md").read_text()
        for name in POLICIES:
            row = re.search(rf"^\| `{name}` .*\| `([a-z-]+)` \|$", text, re.MULTILINE)
            assert row is not None, name
            assert row[1] == traits_of(name).eviction
        for name in EVICTIONS:
            assert f"\n| `{name}` |" in text

    def test_evictions_of_a_row_are_there(self) -> None:
        for name in POLICIES:
            traits = traits_of(name)
            assert {traits.eviction, traits.default_eviction} <= set(EVICTIONS)

    def test_a_message_names_policies_that_do_without_states(self) -> None:
        assert 'policy="next-gate"' in instead("draft")
        assert "horizon" not in instead("draft")
        assert "next-gate" not in instead("draft", "target")
        assert "oracle" not in instead("draft")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("policies"))
    return spmoe.open_store(sorted(folder.glob("*.safetensors")))


@pytest.fixture(scope="module")
def expected(target_path: Path) -> list[int]:
    return generate_alone(load_plain(target_path), PROMPT, NEW_TOKENS)[0]


class Recorder(Policy):
    """Keeps the events that it sees, and plans what it was given."""

    def __init__(self, plan: Any = None) -> None:
        self.wanted = plan
        self.events: list[Event] = []

    def plan(self, event: Event) -> Iterable[tuple[int, int]] | None:
        self.events.append(event)
        if isinstance(self.wanted, Exception):
            raise self.wanted
        wanted: Iterable[tuple[int, int]] | None = self.wanted
        return wanted


def open_runtime(store: Any, policy: Any, **options: Any) -> Runtime:
    return Runtime(store, expert_memory="50%", experts_per_token=3, policy=policy, **options)


def run_layer(runtime: Runtime, layer: int, experts: list[int]) -> torch.Tensor:
    index = torch.tensor([experts])
    x = torch.ones(1, runtime.store.hidden)
    return runtime.forward(layer, x, index, torch.ones(1, len(experts)))


class TestAPolicyInPython:
    def test_it_sees_predictions_accesses_and_ends(self, store: Any) -> None:
        policy = Recorder()
        scores = np.arange(store.expert_count, dtype=np.float64)
        with open_runtime(store, policy) as runtime:
            runtime.predict(1, scores, source="target")
            run_layer(runtime, 0, [5, 2, 7])
            runtime.end_iteration()
            assert runtime.stats()["policy"] == runtime.policy == "Recorder"
        prediction, access, end = policy.events
        assert (prediction.kind, prediction.layer, prediction.source) == ("prediction", 1, "target")
        assert prediction.scores is not None
        assert prediction.scores.dtype == np.float32
        assert prediction.scores.tolist() == scores.tolist()
        assert prediction.experts is None
        assert (access.kind, access.layer) == ("access", 0)
        assert access.experts is not None
        assert access.experts.tolist() == [2, 5, 7]
        assert access.scores is None
        assert not access.resident.any()
        assert end.kind == "end"
        assert end.resident.shape == (store.layer_count, store.expert_count)
        assert end.resident.dtype == np.bool_
        assert np.argwhere(end.resident).tolist() == [[0, 2], [0, 5], [0, 7]]

    def test_a_prompt_causes_no_access(self, store: Any) -> None:
        policy = Recorder()
        with open_runtime(store, policy) as runtime:
            x = torch.ones(33, store.hidden)
            index = torch.arange(33)[:, None] % store.expert_count
            runtime.forward(0, x, index, torch.ones(33, 1))
        assert not policy.events

    def test_what_it_plans_is_prefetched(self, store: Any) -> None:
        policy = Recorder([(1, 4), (1, 6), (2, 0)])
        with open_runtime(store, policy) as runtime:
            runtime.end_iteration()
            run_layer(runtime, 1, [4, 6])
            run_layer(runtime, 2, [0])
            stats = runtime.stats()
        assert stats["misses"] == 0
        assert stats["demand_bytes"] == 0
        assert stats["prefetch_used_bytes"] == 3 * store.blob_bytes

    def test_a_plan_that_is_none_leaves_the_one_before(self, store: Any) -> None:
        policy = Recorder()
        scores = np.zeros(store.expert_count)
        # A second for each expert: what does not begin at once waits.
        with open_runtime(store, policy, link_gbps=store.blob_bytes / 1e9) as runtime:
            waiting = []
            for wanted in ([(1, expert) for expert in range(8)], None, [(2, 0)], []):
                policy.wanted = wanted
                runtime.predict(2, scores)
                waiting.append(runtime.stats(by_layer=False)["queue_depth"])
        assert waiting[0] == waiting[1] > 1
        assert waiting[2:] == [1, 0]

    @pytest.mark.parametrize("lengths", [(0,), (1, 4)])
    def test_it_changes_no_token(
        self, target_path: Path, expected: list[int], lengths: tuple[int, ...]
    ) -> None:
        class Likeliest(Policy):
            def plan(self, event: Event) -> list[tuple[int, int]] | None:
                if event.scores is None:
                    return None
                return [(event.layer, int(expert)) for expert in event.scores.argsort()[-3:]]

        with spmoe.load(
            target_path, target_path, expert_memory="50%", policy=Likeliest()
        ) as engine:
            for length in lengths:
                result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, draft_length=length)
                assert result.token_ids == expected
            stats = engine.stats()["total"]
            assert stats["predictions"] > 0
            assert stats["prefetch_used_bytes"] > 0
            assert "policy Likeliest" in repr(engine)

    @pytest.mark.parametrize(
        ("wanted", "reason"),
        [
            (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
            ([(99, 0)], "layer is 99"),
            ([(0, -1)], "expert is -1"),
            ([(0, 0.5)], "expert is 0.5"),
            ([3], "plan holds 3 .*give .layer, expert. pairs"),
            (7, "not iterable"),
        ],
    )
    def test_one_that_fails_is_off_with_one_warning_and_the_text_stays(
        self,
        target_path: Path,
        expected: list[int],
        caplog: pytest.LogCaptureFixture,
        wanted: Any,
        reason: str,
    ) -> None:
        policy = Recorder(wanted)
        with (
            caplog.at_level(logging.WARNING, "spmoe"),
            spmoe.load(target_path, target_path, expert_memory="50%", policy=policy) as engine,
        ):
            result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, draft_length=2)
            assert engine.stats()["total"]["prefetch_used_bytes"] == 0
        assert result.token_ids == expected
        assert len(policy.events) == 1
        (warning,) = [record for record in caplog.records if "is off" in record.getMessage()]
        assert re.search(reason, warning.getMessage())

    def test_wrong_ones_are_refused(self, store: Any) -> None:
        with pytest.raises(
            spmoe.InvalidArgument, match=r"the class Recorder; give .* Recorder\(\)"
        ):
            open_runtime(store, Recorder)
        for name, wrong in (("eviction", "newest"), ("reads", ("oracle",))):
            policy = Recorder()
            setattr(policy, name, wrong)
            with pytest.raises(spmoe.InvalidArgument, match=rf"Policy\.{name} is .*use one of"):
                open_runtime(store, policy)
        with pytest.raises(TypeError, match="plan"):
            Policy()  # type: ignore[abstract]

    @pytest.mark.parametrize(
        ("own", "asked", "found"),
        [
            ("auto", "auto", "lru"),
            ("lfu", "auto", "lfu"),
            ("lfu", None, "lfu"),
            ("lfu", "lru", "lru"),
        ],
    )
    def test_it_names_its_own_eviction(
        self, store: Any, own: str, asked: str | None, found: str
    ) -> None:
        policy = Recorder()
        policy.eviction = own
        with open_runtime(store, policy, eviction=asked) as runtime:
            assert runtime.stats()["eviction"] == found
