"""The engine: what goes in, what comes out, and that drafting never changes it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spmoe
from families import greedy
from spmoe import _core
from spmoe.models.loading import load_plain
from spmoe.models.text import encode
from spmoe.system import closeable

PROMPT = "Once upon a time there was a disk"
NEW_TOKENS = 24
DRAFT_LENGTHS = (0, 1, 4, 9)


@pytest.fixture(scope="module")
def engine(target_path: Path) -> Iterator[spmoe.Engine]:
    # Its own draft: every proposal is right, so that most of a text is accepted runs.
    with spmoe.load(target_path, target_path, expert_memory="50%", draft_length=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(target_path: Path, engine: spmoe.Engine) -> list[int]:
    return greedy(
        load_plain(target_path), torch.tensor([encode(engine.tokenizer, PROMPT)]), NEW_TOKENS
    )


class TestLossless:
    """Budget and arrival order: the bits stay. `test_lossless.py` has families and drafts."""

    def test_the_smallest_budget_and_a_slow_link_give_the_same_bits(
        self, target_path: Path, engine: spmoe.Engine, faults: _core.FaultPlan
    ) -> None:
        def logits(engine: spmoe.Engine) -> torch.Tensor:
            iterations = engine.iterate(PROMPT, max_new_tokens=12, draft_length=3)
            return torch.cat([iteration.logits for iteration in iterations])

        wanted = logits(engine)
        store = engine.runtime.store
        wave = engine.target.experts_per_token * (store.blob_bytes + 255) // 256 * 256
        for budget in (wave, "100%"):
            with spmoe.load(target_path, target_path, expert_memory=budget) as other:
                for seed in range(3):
                    faults.plant(delay_seed=seed, max_delay_us=200)
                    assert torch.equal(logits(other), wanted)


@pytest.fixture
def auto(target_path: Path) -> Iterator[spmoe.Engine]:
    # On a link so slow that it pays to verify several tokens at once.
    with spmoe.load(
        target_path,
        target_path,
        expert_memory="20%",
        draft_length="auto",
        policy="horizon",
        link_gbps=0.005,
    ) as engine:
        yield engine


class TestAutoDraftLength:
    """`draft_length="auto"`, from loading to text."""

    def test_it_drafts_where_that_pays_and_writes_the_same(
        self, auto: spmoe.Engine, expected: list[int]
    ) -> None:
        results = [auto.generate(PROMPT, max_new_tokens=NEW_TOKENS) for _ in range(2)]
        assert [result.token_ids for result in results] == [expected] * 2
        first, second = (result.stats for result in results)
        assert first.drafted > 0
        assert second.iterations < first.iterations  # which decodes plainly at first

    def test_a_request_may_ask_for_another_length(
        self, auto: spmoe.Engine, expected: list[int]
    ) -> None:
        for length in (0, 2):
            result = auto.generate(PROMPT, max_new_tokens=NEW_TOKENS, draft_length=length)
            assert result.token_ids == expected
            assert (result.stats.drafted > 0) == (length > 0)

    def test_requests_of_two_threads_share_what_it_learns(
        self, auto: spmoe.Engine, expected: list[int]
    ) -> None:
        def write(_: int) -> list[int]:
            return auto.generate(PROMPT, max_new_tokens=NEW_TOKENS).token_ids

        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(write, range(4))) == [expected] * 4

    def test_costs_that_were_not_measured_are_asked_for(self, target_path: Path) -> None:
        with (
            spmoe.load(target_path, target_path, policy="on-demand", draft_length=4) as engine,
            pytest.raises(spmoe.InvalidArgument, match=r'give draft_length="auto" to spmoe\.load'),
        ):
            engine.generate(PROMPT, draft_length="auto")


class TestRequests:
    def test_a_whole_text_comes_with_its_tokens_and_figures(
        self, engine: spmoe.Engine, expected: list[int]
    ) -> None:
        result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        assert result.token_ids == expected
        assert result.text == engine.tokenizer.decode(expected, skip_special_tokens=True)
        assert result.finish_reason == "length"
        stats = result.stats
        assert (stats.prompt_tokens, stats.new_tokens) == (len(PROMPT), NEW_TOKENS)
        assert stats.drafted >= stats.accepted > 0
        assert stats.acceptance == stats.accepted / stats.drafted
        assert stats.new_tokens == stats.iterations + stats.accepted
        assert stats.hits + stats.late + stats.misses > 0
        assert engine.stats()["request"] == stats.as_dict()

    def test_chunks_of_a_stream_make_up_the_text(self, engine: spmoe.Engine) -> None:
        chunks = list(engine.stream(PROMPT, max_new_tokens=NEW_TOKENS))
        assert len(chunks) > 1
        assert "".join(chunks) == engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).text

    def test_token_ids_and_text_are_the_same_prompt(
        self, engine: spmoe.Engine, expected: list[int]
    ) -> None:
        tokens = encode(engine.tokenizer, PROMPT)
        assert engine.generate(tokens, max_new_tokens=NEW_TOKENS).token_ids == expected

    def test_chat_messages_go_through_the_template(self, engine: spmoe.Engine) -> None:
        messages = [{"role": "user", "content": "Hi"}]
        with pytest.raises(spmoe.InvalidArgument, match="no chat template; give text"):
            engine.generate(messages)
        engine.tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        )
        try:
            assert engine.encode(messages) == engine.encode("<user>Hi", raw=True)
            assert engine.encode("Hi") == engine.encode("<user>Hi", raw=True)
        finally:
            engine.tokenizer.chat_template = None

    @pytest.mark.parametrize("draft_length", DRAFT_LENGTHS)
    @pytest.mark.parametrize("count", [1, 2, 3, 7])
    def test_a_text_has_exactly_as_many_tokens_as_asked(
        self, engine: spmoe.Engine, expected: list[int], draft_length: int, count: int
    ) -> None:
        result = engine.generate(PROMPT, max_new_tokens=count, draft_length=draft_length)
        assert result.token_ids == expected[:count]

    @pytest.mark.parametrize("place", range(1, 8))
    def test_an_end_token_ends_the_text_inside_an_accepted_run(
        self, engine: spmoe.Engine, expected: list[int], place: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ending = expected[place]
        target = engine.target
        monkeypatch.setattr(
            engine, "target", type(target)(**_fields(target) | {"end_token_ids": {ending}})
        )
        result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        assert result.token_ids == expected[: expected.index(ending) + 1]
        assert result.finish_reason == "stop"

    @pytest.mark.parametrize("place", range(1, 8))
    def test_a_stop_string_ends_the_text_inside_an_accepted_run(
        self, engine: spmoe.Engine, place: int
    ) -> None:
        whole = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).text
        stop = whole[place : place + 2]
        for stops in (stop, ["never there", stop]):
            result = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, stop=stops)
            assert result.text == whole[: whole.index(stop)]
            assert result.finish_reason == "stop"
            chunks = engine.stream(PROMPT, max_new_tokens=NEW_TOKENS, stop=stops)
            assert "".join(chunks) == result.text

    def test_a_stream_that_is_dropped_leaves_the_engine_usable(
        self, engine: spmoe.Engine, expected: list[int]
    ) -> None:
        stream = engine.stream(PROMPT, max_new_tokens=NEW_TOKENS)
        next(stream)
        stream.close()
        assert engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).token_ids == expected

    def test_requests_of_several_threads_have_figures_of_their_own(
        self, engine: spmoe.Engine, expected: list[int]
    ) -> None:
        def answer(_: int) -> spmoe.Generation:
            return engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)

        def needed(result: spmoe.Generation) -> int:
            return result.stats.hits + result.stats.late + result.stats.misses

        alone = answer(0)
        with ThreadPoolExecutor(3) as threads:
            results = list(threads.map(answer, range(6)))
        assert [result.token_ids for result in results] == [expected] * 6
        assert [needed(result) for result in results] == [needed(alone)] * 6

    def test_a_request_inside_an_unfinished_stream_is_refused_and_the_stream_goes_on(
        self, engine: spmoe.Engine
    ) -> None:
        whole = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).text
        stream = engine.stream(PROMPT, max_new_tokens=NEW_TOKENS)
        chunks = [next(stream)]
        with pytest.raises(spmoe.Error, match=r"read that stream to its end or close\(\) it"):
            engine.generate(PROMPT)
        chunks += stream
        assert "".join(chunks) == whole
        assert engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).text == whole

    def test_a_stream_that_is_dropped_lets_the_next_thread_go_on(
        self, engine: spmoe.Engine, expected: list[int]
    ) -> None:
        stream = engine.stream(PROMPT, max_new_tokens=NEW_TOKENS)
        next(stream)
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(engine.generate, PROMPT, max_new_tokens=NEW_TOKENS)
            del stream
            assert other.result().token_ids == expected

    def test_the_context_ends_a_text(self, engine: spmoe.Engine) -> None:
        prompt = [65] * (engine.context_length - 5)
        result = engine.generate(prompt, max_new_tokens=100)
        assert len(result.token_ids) == 5
        assert result.finish_reason == "length"

    def test_without_a_draft_it_decodes_plainly(
        self, target_path: Path, expected: list[int]
    ) -> None:
        with spmoe.load(target_path, expert_memory="50%") as plain:
            result = plain.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        assert result.token_ids == expected
        assert (result.stats.drafted, result.stats.iterations) == (0, NEW_TOKENS)
        assert result.stats.acceptance is None


class TestBadRequests:
    """Each is refused with the cure, and the next good request is answered."""

    @pytest.fixture(autouse=True)
    def still_answers(self, engine: spmoe.Engine, expected: list[int]) -> Iterator[None]:
        yield
        assert engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).token_ids == expected

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("", "the prompt is empty; give at least one token"),
            ([], "the prompt is empty; give at least one token"),
            ([1, 99999], "has token id 99999; give at least one token from 0 to 263"),
            ([65] * 512, "has 512 tokens, but the model's context is 512.*shorten the prompt"),
        ],
    )
    def test_a_prompt_that_cannot_be_read(
        self, engine: spmoe.Engine, prompt: object, message: str
    ) -> None:
        with pytest.raises(spmoe.InvalidArgument, match=message):
            engine.generate(prompt)

    def test_no_tokens_asked(self, engine: spmoe.Engine) -> None:
        with pytest.raises(spmoe.InvalidArgument, match="max_new_tokens must be at least 1, got 0"):
            engine.generate(PROMPT, max_new_tokens=0)

    @pytest.mark.parametrize("count", [1.5, 2.0, "5", None, True, torch.tensor(2.0)])
    def test_a_count_of_tokens_that_is_no_whole_number(
        self, engine: spmoe.Engine, count: object
    ) -> None:
        with pytest.raises(
            spmoe.InvalidArgument, match="max_new_tokens must be a whole number, got"
        ):
            engine.stream(PROMPT, max_new_tokens=count)

    @pytest.mark.parametrize("stop", [5, b"x", ["a", 5], [None], 1.5, True])
    def test_a_stop_that_is_no_string(self, engine: spmoe.Engine, stop: object) -> None:
        with pytest.raises(spmoe.InvalidArgument, match="stop must be a string, several of them"):
            engine.generate(PROMPT, stop=stop)

    def test_a_draft_length_out_of_range(self, engine: spmoe.Engine) -> None:
        with pytest.raises(spmoe.InvalidArgument, match=r"from 0 .* to 31, got 99"):
            engine.generate(PROMPT, draft_length=99)

    def test_whole_numbers_of_numpy_and_no_stop_are_read(self, engine: spmoe.Engine) -> None:
        result = engine.generate(PROMPT, max_new_tokens=np.int32(3), stop=None)
        assert len(result.token_ids) == 3
        assert len(engine.generate(PROMPT, max_new_tokens=3, stop=()).token_ids) == 3

    def test_an_option_that_does_not_exist(self, engine: spmoe.Engine) -> None:
        with pytest.raises(TypeError, match="temprature"):
            engine.generate(PROMPT, temprature=1.0)


def test_a_read_error_in_the_middle_of_decoding_fails_that_request_alone(
    target_path: Path, expected: list[int], faults: _core.FaultPlan
) -> None:
    with spmoe.load(target_path, expert_memory="50%", policy="on-demand") as engine:
        stream = engine.stream(PROMPT, max_new_tokens=NEW_TOKENS)
        next(stream)
        faults.plant(fail_at_chunk=1)
        with pytest.raises(
            spmoe.DeviceError, match=r"could not fill expert \d+ of layer \d+ \(model-.*safetensors"
        ):
            list(stream)
        assert engine.generate(PROMPT, max_new_tokens=NEW_TOKENS).token_ids == expected


class TestLoad:
    def test_a_budget_under_one_wave_is_refused_with_the_bytes_needed(
        self, target_path: Path
    ) -> None:
        with pytest.raises(spmoe.InvalidArgument, match=r"give at least \d+ bytes"):
            spmoe.load(target_path, expert_memory=1)

    def test_a_device_that_is_not_there_is_refused(self, target_path: Path) -> None:
        with pytest.raises(spmoe.InvalidArgument, match='device "tpu" is not one of auto, host'):
            spmoe.load(target_path, device="tpu")

    def test_pinned_experts_change_no_token(self, target_path: Path) -> None:
        steps: list[tuple[str, int, int]] = []
        with spmoe.load(target_path) as plain:
            text = plain.generate("Once", max_new_tokens=8).token_ids
        with spmoe.load(
            target_path, pinned_memory="50%", progress=lambda *step: steps.append(step)
        ) as engine:
            assert engine.generate("Once", max_new_tokens=8).token_ids == text
            stats = engine.runtime.stats()
            total = engine.runtime.store.total_bytes
        assert 0 < stats["pinned_bytes"] <= total / 2
        assert stats["pinned_fill_s"] > 0
        assert any(description.startswith("filling page-locked") for description, *_ in steps)

    def test_a_dtype_that_does_not_exist_is_refused(self, target_path: Path) -> None:
        with pytest.raises(spmoe.InvalidArgument, match='dtype "int8" is not'):
            spmoe.load(target_path, dtype="int8")

    def test_a_closed_engine_says_so(self, target_path: Path) -> None:
        engine = spmoe.load(target_path)
        engine.close()
        engine.close()
        with pytest.raises(spmoe.Error, match="closed"):
            engine.generate(PROMPT)

    def test_a_thread_that_waits_for_its_turn_learns_that_the_engine_was_closed(
        self, target_path: Path
    ) -> None:
        with ThreadPoolExecutor(1) as threads:
            with spmoe.load(target_path) as engine:
                stream = engine.stream(PROMPT)
                next(stream)
                other = threads.submit(engine.generate, PROMPT)
                while len(engine._turns._queue) < 2:
                    os.sched_yield()
            with pytest.raises(spmoe.Error, match="closed"):
                other.result()
        with pytest.raises(spmoe.Error, match="closed"):
            list(stream)

    def test_progress_ends_at_its_total(self, target_path: Path, draft_path: Path) -> None:
        calls: list[tuple[str, int, int]] = []
        with spmoe.load(target_path, draft_path, progress=lambda *call: calls.append(call)):
            pass
        assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
        assert calls[-1][1] == calls[-1][2]


def test_an_engine_shows_what_it_is(engine: spmoe.Engine, target_path: Path) -> None:
    text = repr(engine)
    assert re.fullmatch(
        r"<spmoe\.Engine qwen3_moe, 3 layers of 8 experts, .* KiB of .* KiB in expert memory on "
        r"cpu, policy horizon, draft qwen3_moe, draft length 4>",
        text,
    ), text
    closed = spmoe.load(target_path, policy="on-demand")
    closed.close()
    assert "policy on-demand, draft none" in repr(closed)


def _fields(target: object) -> dict[str, object]:
    return {name: getattr(target, name) for name in target.__dataclass_fields__}


def test_the_end_of_the_interpreter_waits_for_passes_and_for_nothing_between_them(
    engine: spmoe.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_forward: list[int] = []
    forward = engine.runtime.forward

    def watched(*arguments: Any) -> torch.Tensor:
        at_forward.append(closeable.working.count)
        return forward(*arguments)

    monkeypatch.setattr(engine.runtime, "forward", watched)
    for _ in engine.iterate(PROMPT, max_new_tokens=3, draft_length=2):
        assert closeable.working.count == 0
    assert set(at_forward) == {1}
