"""The lossless property: whatever is drafted, tokens are those of `model.generate`."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import spmoe
from families import ALL_FAMILIES, LINEAR_ATTENTION, config_of, make_checkpoint, write_model
from spmoe.models.loading import load_plain
from spmoe.models.reference import generate_alone

PROMPT = list(b"Once upon a time there was a disk")
NEW_TOKENS = 24
# In transformers, a pass of several tokens of these does not continue the text: jamba's scan starts
# from an empty state, minimax's attention mask from an empty cache.
PLAIN_FAMILIES = {"jamba", "minimax"}


def alone(path: Path, prompt: list[int] = PROMPT, count: int = NEW_TOKENS) -> list[int]:
    return generate_alone(load_plain(path), prompt, count)[0]


def written(
    engine: spmoe.Engine,
    draft_length: int,
    prompt: list[int] = PROMPT,
    count: int = NEW_TOKENS,
) -> tuple[list[int], int, int]:
    """The new tokens, up to an end-of-text token; how many were drafted, and accepted."""
    result = engine.generate(prompt, max_new_tokens=count, draft_length=draft_length)
    return result.token_ids, result.stats.drafted, result.stats.accepted


def spoil(engine: spmoe.Engine, tokens: list[int]) -> None:
    """Let the draft, a copy of the target, never propose the rarer half of ``tokens``."""
    by_count = [token for token, _ in Counter(tokens).most_common()]
    with torch.no_grad():
        engine.draft.get_output_embeddings().weight[by_count[(len(by_count) + 1) // 2 :]] = 0


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES.keys() - PLAIN_FAMILIES))
def test_tokens_are_those_of_generate(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_checkpoint(family, tmp_path)
    expected = alone(path)
    with spmoe.load(path, path, expert_memory="50%") as engine:
        assert written(engine, 0) == (expected, 0, 0)
        tokens, drafted, accepted = written(engine, 4)
        assert tokens == expected
        assert accepted > 0.9 * drafted > 0
        spoil(engine, expected)
        drafted = accepted = 0
        for draft_length in (1, 4, 9):
            tokens, *counts = written(engine, draft_length)
            assert tokens == expected, draft_length
            drafted, accepted = drafted + counts[0], accepted + counts[1]
        assert accepted > 0
        assert accepted < drafted or len(set(expected)) == 1
        assert engine.runtime.calibration()  # predictions were made, and none failed
    assert not [record for record in caplog.records if record.name == "spmoe"]


@pytest.mark.parametrize("family", sorted(PLAIN_FAMILIES))
def test_a_target_whose_state_cannot_continue_decodes_plainly(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_checkpoint(family, tmp_path)
    with spmoe.load(path, path, expert_memory="50%") as engine:
        assert written(engine, 4) == (alone(path), 0, 0)
        assert "rejected tokens cannot leave the target's cache" in engine.draft_note
    warnings = [record for record in caplog.records if record.name == "spmoe"]
    assert len(warnings) == 1


@pytest.fixture(scope="module")
def expected(target_path: Path) -> list[int]:
    return alone(target_path, count=40)


class TestDraftsOfEveryKind:
    """A property of the draft changes speed, never the text, and never ends it."""

    def draft_of(self, path: Path, model_type: str, **changed: Any) -> Path:
        config = config_of(model_type, **changed)
        for unknown in vars(config).keys() - vars(AutoConfig.for_model(model_type)).keys():
            delattr(config, unknown)  # a mamba of the hub says nothing of heads
        return write_model(config, path)

    @pytest.mark.parametrize(
        ("model_type", "changed"),
        [
            ("llama", {"intermediate_size": 96, "num_hidden_layers": 1}),
            ("qwen3_5_text", {"intermediate_size": 96, **LINEAR_ATTENTION}),
            ("mamba", {"state_size": 8, "time_step_rank": 4}),
            ("falcon", {}),  # names its layers as few families do
        ],
    )
    def test_its_architecture(
        self,
        target_path: Path,
        expected: list[int],
        tmp_path: Path,
        model_type: str,
        changed: dict[str, Any],
    ) -> None:
        draft = self.draft_of(tmp_path, model_type, **changed)
        with spmoe.load(target_path, draft, expert_memory="50%") as engine:
            tokens, drafted, _ = written(engine, 4, count=40)
        assert tokens == expected
        assert drafted > 0

    @pytest.mark.parametrize(("target_size", "draft_size"), [(320, 259), (320, 400), (264, 320)])
    def test_embeddings_padded_to_another_size(
        self, tmp_path: Path, target_size: int, draft_size: int
    ) -> None:
        config = ALL_FAMILIES["qwen3_moe"]()
        config.vocab_size = target_size
        target = write_model(config, tmp_path / "target")
        draft = self.draft_of(
            tmp_path / "draft", "llama", intermediate_size=96, vocab_size=draft_size
        )
        # Most of these ids stand for no token of the tokenizer: a random model writes them too.
        prompts = (PROMPT, [*PROMPT, target_size - 1])
        with spmoe.load(target, draft, expert_memory="50%") as engine:
            for prompt in prompts:
                tokens, drafted, _ = written(engine, 4, prompt)
                assert tokens == alone(target, prompt)
                assert (drafted > 0) == (max(prompt) < draft_size)

    def test_a_shorter_context(
        self, target_path: Path, expected: list[int], tmp_path: Path
    ) -> None:
        context = len(PROMPT) + 10
        draft = self.draft_of(
            tmp_path, "llama", intermediate_size=96, max_position_embeddings=context
        )
        long_prompt = PROMPT * 3
        with spmoe.load(target_path, draft, expert_memory="50%") as engine:
            tokens, drafted, _ = written(engine, 4, count=40)
            assert tokens == expected
            assert 0 < drafted < 40
            assert written(engine, 4, long_prompt) == (alone(target_path, long_prompt), 0, 0)

    def test_one_that_cannot_run_is_left_out_with_one_warning(
        self,
        target_path: Path,
        expected: list[int],
        draft_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("no kernel for this processor")

        monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", fail)
        with spmoe.load(target_path, draft_path, expert_memory="50%") as engine:
            assert written(engine, 4, count=40) == (expected, 0, 0)
            assert "no kernel for this processor" in engine.draft_note
        said = [record.getMessage() for record in caplog.records]
        (warning,) = [text for text in said if "without the draft" in text]
        assert "decoding plainly, without the draft: LlamaForCausalLM" in warning


class TestPredictionsThatFail:
    """They are turned off with one warning, and the text stays."""

    def test_in_a_pass(
        self, target_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("no scores")

        with spmoe.load(target_path, target_path, expert_memory="50%") as engine:
            engine.planner = None  # which might predict nothing here
            monkeypatch.setattr(engine.runtime, "predict", fail)
            for draft_length in (4, 0):
                assert written(engine, draft_length)[0] == alone(target_path)
        (warning,) = [record for record in caplog.records if record.name == "spmoe"]
        assert "not predicted any more" in warning.getMessage()
        assert "RuntimeError: no scores" in warning.getMessage()

    def test_as_the_model_is_loaded(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        config = config_of(  # its norms are behind attention and experts
            "flex_olmo", intermediate_size=48, num_experts=8, num_experts_per_tok=2
        )
        path = write_model(config, tmp_path)
        with spmoe.load(path, path, expert_memory="50%") as engine:
            tokens, drafted, _ = written(engine, 4)
        assert tokens == alone(path)
        assert drafted > 0
        (warning,) = [record for record in caplog.records if record.name == "spmoe"]
        assert "no norm before its experts" in warning.getMessage()


class TestWhatGenerateDoesAroundForward:
    """The target's own generation configuration and switches hold for the engine too."""

    @pytest.mark.parametrize(
        "settings",
        [
            {"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3},
            {"no_repeat_ngram_size": 2},
            {"bad_words_ids": [[24, 55]]},
            {"suppress_tokens": [55], "begin_suppress_tokens": [24]},
            {"min_new_tokens": 20},
            {"exponential_decay_length_penalty": [2, 1.5]},
            {"sequence_bias": [[[55], 100.0]], "remove_invalid_values": True},
            {"forced_eos_token_id": 257, "max_new_tokens": 3},  # the request says how many
        ],
        ids=",".join,
    )
    def test_processors_of_logits(
        self, target_path: Path, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        path = Path(shutil.copytree(target_path, tmp_path / "target"))
        file = path / "generation_config.json"
        own = alone(path)
        if "min_new_tokens" in settings:  # a token that the text holds early ends it
            settings = settings | {"eos_token_id": own[3]}
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        expected = alone(path)
        assert expected != own  # the setting does something here
        with spmoe.load(path, path, expert_memory="50%", policy="on-demand") as engine:
            for draft_length in (0, 4):
                tokens, _, accepted = written(engine, draft_length)
                assert tokens == expected
                assert (accepted > 0) == (draft_length > 0)

    @pytest.mark.parametrize(
        ("setting", "value"), [("num_beams", 4), ("stop_strings", ["a"]), ("guidance_scale", 2.0)]
    )
    def test_what_is_not_applied_is_named_in_a_warning(
        self,
        target_path: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        setting: str,
        value: Any,
    ) -> None:
        path = Path(shutil.copytree(target_path, tmp_path / "target"))
        file = path / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
        with spmoe.load(path, path, policy="on-demand") as engine:
            for draft_length in (0, 4):
                assert written(engine, draft_length)[0] == alone(target_path)
        (warning,) = [record for record in caplog.records if record.name == "spmoe"]
        asked = f"generation_config.json of the target asks for {setting}={value}"
        assert asked in warning.getMessage()

    @pytest.mark.parametrize(
        ("prompt_length", "window"), [(40, None), (63, 16), (64, None), (65, None), (70, None)]
    )
    def test_frequencies_that_switch_with_the_length(
        self, tmp_path: Path, prompt_length: int, window: int | None
    ) -> None:
        config = ALL_FAMILIES["phimoe"]()
        config.sliding_window = window
        config.original_max_position_embeddings = 64
        config.rope_parameters = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + 2 * i for i in range(8)],
            "short_mscale": 1.0,
            "long_mscale": 1.2,
            "original_max_position_embeddings": 64,
        }
        path = write_model(config, tmp_path)
        prompt = (PROMPT * 3)[:prompt_length]
        expected = alone(path, prompt, 40)
        with spmoe.load(path, path, expert_memory="50%", policy="on-demand") as engine:
            for draft_length in (0, 4):
                tokens, drafted, accepted = written(engine, draft_length, prompt, 40)
                assert tokens == expected
            assert accepted > drafted / 2
            spoil(engine, expected)
            tokens, drafted, accepted = written(engine, 4, prompt, 40)
            assert tokens == expected
            assert accepted < drafted


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_next", "minimax"])
def test_a_prompt_read_in_chunks_gives_the_same_text(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    prompt = PROMPT * 2  # past gpt_oss's sliding window
    with spmoe.load(path, path, expert_memory="50%", policy="on-demand") as engine:
        engine.prompt_chunk = 7
        for draft_length in (0, 4):
            assert written(engine, draft_length, prompt)[0] == alone(path, prompt)


def test_logits_that_are_not_finite_are_named_once_with_their_file(
    target_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged disk looks just so; the text is still the one of `generate`."""
    path = Path(shutil.copytree(target_path, tmp_path / "target"))
    shards = {file: load_file(file) for file in path.glob("*.safetensors")}
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    for file, tensors in shards.items():
        damaged = [tensors[name.format(i)] for i in range(8) if name.format(i) in tensors]
        for tensor in damaged:
            tensor[0, 0] = torch.nan
        if damaged:
            save_file(tensors, file, metadata={"format": "pt"})
    with spmoe.load(path, expert_memory="50%", policy="on-demand") as engine:
        for _ in range(2):
            caplog.clear()
            tokens, *_ = written(engine, 0)
            assert tokens == alone(path)
            (warning,) = [record.getMessage() for record in caplog.records]
            assert "the target's logits are not finite: expert 0 of MoE layer 1 is not" in warning
            assert ".safetensors" in warning
