"""A model is asked what its cache can do; nothing is assumed from its family."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import ALL_FAMILIES, config_of
from spmoe.errors import InvalidArgument, OutOfMemory
from spmoe.models import cache_support as module
from spmoe.models.cache_support import cache_support, cached, why_not_draft
from spmoe.models.loading import place

TEXT = [5, 9, 2, 6, 250, 7, 31, 8, 1, 77, 4, 90]


def build(family: str, **changed: Any) -> PreTrainedModel:
    config = ALL_FAMILIES[family]() if family in ALL_FAMILIES else config_of(family, **changed)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("family", "rewind", "several"),
    [
        ("mixtral", "crop", True),
        ("gpt_oss", "crop", True),  # sliding windows
        ("qwen3_next", "restore", True),
        ("granitemoehybrid", "restore", True),
        ("jamba", "restore", False),
        ("minimax", "restore", False),  # a cache class of its own
    ],
)
def test_rewinding_leaves_no_trace(family: str, rewind: str, several: bool) -> None:
    model = build(family)
    support = cache_support(model)
    assert (support.rewind, support.several) == (rewind, several)
    assert (support.reason == "") == several
    reader, alone = cached(model), cached(model)
    for read in (reader, alone):
        read.read(TEXT[:6])
    reader.read([200, 201, 202], last=0)
    reader.rewind(6)
    unread = TEXT[reader.length : 8]
    assert torch.equal(reader.read(unread, last=2), alone.read(TEXT[6:8], last=2))
    for token in TEXT[8:]:
        assert torch.equal(reader.read([token]), alone.read([token]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_is_held_to_its_own_rounding(dtype: torch.dtype) -> None:
    support = cache_support(build("llama", intermediate_size=96).to(dtype))
    assert (support.rewind, support.several, support.reason) == ("crop", True, "")


def test_a_text_forgotten_past_the_first_pass_is_read_again() -> None:
    reader = cached(build("qwen3_next"))
    expected = reader.read(TEXT)
    reader.rewind(5)
    assert reader.length == 0
    assert torch.equal(reader.read(TEXT), expected)


def test_a_model_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    support = cache_support(model)
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: pytest.fail("asked again"))
    assert cache_support(model) is support


def test_passes_that_differ_from_generate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    prepare = type(model).prepare_inputs_for_generation

    def shift(
        self: Any, input_ids: torch.Tensor, attention_mask: Any = "none given", **options: Any
    ) -> dict[str, Any]:
        if attention_mask == "none given":  # `generate` gives one
            return prepare(self, input_ids.roll(1, dims=1), **options)
        return prepare(self, input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", shift)
    with pytest.raises(InvalidArgument, match="do not give what its own generate gives"):
        cache_support(model)


def test_a_model_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model, draft = build("mixtral"), build("llama", intermediate_size=96)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", fail)
    reason = why_not_draft(model, draft)
    assert reason is not None
    assert "LlamaForCausalLM (llama) cannot write a token" in reason
    assert "RuntimeError: no such kernel" in reason


def test_a_recurrent_draft_fits_an_attention_target_and_not_the_other_way() -> None:
    mamba = build("mamba", state_size=8, time_step_rank=4)
    assert why_not_draft(build("mixtral"), mamba) is None
    reason = why_not_draft(build("jamba"), mamba)
    assert reason is not None
    assert "rejected tokens cannot leave the target's cache" in reason


def test_a_pass_that_does_not_fit_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    reader = cached(model)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 64 GiB")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(OutOfMemory, match=r"pass of 12 tokens behind 0 .* shorten the prompt"):
        reader.read(TEXT)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 64 GiB"),
    ],
)
def test_memory_that_runs_out_in_the_trial_is_no_fault_of_the_model(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", fail)
    with pytest.raises(OutOfMemory, match="cannot read a token"):
        cache_support(build("llama"))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_model_that_does_not_fit_on_its_device_names_the_cure(error: Exception) -> None:
    class Large(torch.nn.Module):
        def to(self, *_: Any, **__: Any) -> Any:
            raise error

    with pytest.raises(OutOfMemory, match=r"Large on cpu does not fit .* use a smaller draft"):
        place(Large(), torch.device("cpu"))  # type: ignore[arg-type]


def test_threads_that_ask_at_once_wait_for_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    trial = module._try
    tried: list[PreTrainedModel] = []
    other = threading.Thread(target=cache_support, args=(model,))

    def slow_trial(model: PreTrainedModel) -> module.CacheSupport:
        tried.append(model)
        if len(tried) == 1:
            other.start()
            other.join(0.2)  # it would be in a trial of its own by now
        return trial(model)

    monkeypatch.setattr(module, "_try", slow_trial)
    cache_support(model)
    other.join()
    assert tried == [model]
