"""Loading: what is wrong with a checkpoint is said before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from families import FAMILIES, make_checkpoint, make_dense_draft, make_tokenizer
from spmoe.errors import CheckpointError, InvalidArgument
from spmoe.models import experts, loading
from spmoe.models.activation import recognise
from spmoe.models.checkpoint import find_checkpoint
from spmoe.models.loading import load_draft, load_plain, load_target, load_tokenizer
from spmoe.runtime import Runtime

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
DENSE = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("good"))


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to break."""
    return Path(shutil.copytree(good, tmp_path / "broken"))


def shard_of(checkpoint: Path, tensor: str) -> Path:
    return checkpoint / json.loads((checkpoint / INDEX).read_text())["weight_map"][tensor]


def change_tensors(
    checkpoint: Path, shard: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    index = json.loads((checkpoint / INDEX).read_text())
    others = {name: file for name, file in index["weight_map"].items() if file != shard.name}
    index["weight_map"] = others | dict.fromkeys(tensors, shard.name)
    (checkpoint / INDEX).write_text(json.dumps(index))


def change_config(checkpoint: Path, **changed: object) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_a_dense_model_is_refused_as_a_target(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"\(llama\) has no routed experts.*as the draft"):
        load_target(make_dense_draft(tmp_path))


def test_a_config_with_no_moe_layer_is_refused(broken: Path) -> None:
    change_config(broken, mlp_only_layers=[0, 1, 2])
    with pytest.raises(InvalidArgument, match=r"no routed experts"):
        load_target(broken)


def test_a_config_without_experts_per_token_is_refused(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v2", tmp_path)
    change_config(tmp_path, num_experts_per_tok=None)
    with pytest.raises(
        InvalidArgument, match=r"how many experts a token uses.*num_experts_per_tok"
    ):
        load_target(tmp_path)


def test_experts_without_a_gate_are_refused(good: Path) -> None:
    layers = _layers_of(good)
    layers[0].experts.has_gate = False
    with pytest.raises(InvalidArgument, match=r"Qwen3MoeExperts have no gate.*use transformers"):
        experts.describe(layers)


def test_an_unknown_activation_is_refused(broken: Path) -> None:
    change_config(broken, hidden_act="relu")
    with pytest.raises(InvalidArgument, match=r"join gate and up in a way.*silu, gelu, gelu_tanh"):
        load_target(broken)


def test_experts_that_override_the_gate_are_refused(good: Path) -> None:
    layers = _layers_of(good)
    for layer in layers:
        layer.experts._apply_gate = lambda joined: joined.chunk(2, -1)[0].clamp(max=1e3)
    with pytest.raises(InvalidArgument, match=r"join gate and up in a way"):
        experts.describe(layers)


@pytest.mark.parametrize(
    ("hidden_act", "expected"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
    ],
)
def test_an_activation_is_recognised_by_its_numbers(hidden_act: str, expected: str) -> None:
    class Gated(nn.Module):
        def _apply_gate(self, joined: torch.Tensor) -> torch.Tensor:
            gate, up = joined.chunk(2, dim=-1)
            return ACT2FN[hidden_act](gate) * up

    assert recognise(Gated(), interleaved=False).name == expected


def test_a_missing_expert_tensor_is_named(broken: Path) -> None:
    change_tensors(broken, shard_of(broken, EXPERT), lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(CheckpointError, match=r"expert 3 .*layer 1|layer 1.*expert 3|experts.3"):
        load_target(broken)


def test_a_missing_dense_tensor_is_named(broken: Path) -> None:
    change_tensors(broken, shard_of(broken, DENSE), lambda tensors: tensors.pop(DENSE))
    with pytest.raises(CheckpointError, match=rf"lacks the tensor {DENSE} \(1 missing"):
        load_target(broken)


def test_a_truncated_shard_is_named(broken: Path) -> None:
    shard = shard_of(broken, EXPERT)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        load_target(broken)


def test_a_draft_with_a_truncated_shard_is_refused(broken: Path) -> None:
    shard = shard_of(broken, DENSE)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"damaged.*download the checkpoint again"):
        load_draft(broken)


def test_an_expert_of_a_wrong_dtype_is_refused(broken: Path) -> None:
    def to_int8(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT] = tensors[EXPERT].to(torch.int8)

    change_tensors(broken, shard_of(broken, EXPERT), to_int8)
    with pytest.raises(CheckpointError, match=r"(?i)int8|I8"):
        load_target(broken)


def test_expert_tensors_that_nobody_reads_are_refused(broken: Path) -> None:
    scale = EXPERT.replace("weight", "weight_scale")
    change_tensors(
        broken,
        shard_of(broken, EXPERT),
        lambda tensors: tensors.update({scale: torch.ones(1)}),
    )
    with pytest.raises(CheckpointError, match=r"(weight|gate_up_proj)_scale \(1 such"):
        load_target(broken)


def test_tensors_that_do_not_fit_the_config_are_refused(broken: Path) -> None:
    change_config(broken, moe_intermediate_size=16)
    with pytest.raises(CheckpointError, match=r"8 experts of 64 x 32.*asks for 8 of 64 x 16"):
        load_target(broken)
    change_config(broken, moe_intermediate_size=32, num_key_value_heads=4)
    with pytest.raises(CheckpointError, match=r"k_proj.weight .* is \[32, 64\].*\[64, 64\]"):
        load_target(broken)


def test_a_quantized_checkpoint_is_refused(broken: Path) -> None:
    change_config(broken, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(InvalidArgument, match=r"is quantized \(mxfp4\)"):
        load_target(broken)


def test_a_model_without_a_tokenizer_is_refused_with_the_cure(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, with_tokenizer=False)
    with pytest.raises(CheckpointError, match=r"has no tokenizer.*tokenizer.json"):
        load_tokenizer(tmp_path)


def test_the_tokenizer_beside_the_weights_is_loaded(good: Path) -> None:
    tokens = load_tokenizer(good)("two words")["input_ids"]
    assert tokens == make_tokenizer()("two words")["input_ids"]


def test_a_target_cannot_be_saved_without_its_experts(good: Path, tmp_path: Path) -> None:
    target = load_target(good)
    with pytest.raises(InvalidArgument, match=r"would write a checkpoint without them.*copy"):
        target.model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_target_without_a_runtime_says_so(good: Path) -> None:
    target = load_target(good)
    with pytest.raises(InvalidArgument, match=r"no runtime is attached"):
        target.model(torch.tensor([[1, 2, 3]]))


def test_a_runtime_over_other_experts_is_not_attached(good: Path, tmp_path: Path) -> None:
    target, other = load_target(good), load_target(make_checkpoint("glm4_moe", tmp_path))
    with (
        Runtime(other.store, expert_memory="100%", experts_per_token=3) as runtime,
        pytest.raises(InvalidArgument, match=r"2 layers, but the model has 3"),
    ):
        experts.attach(target, runtime)


def test_a_target_has_no_gradients_and_the_asked_dtype(good: Path) -> None:
    for dtype in (None, torch.bfloat16):
        model = load_target(good, dtype=dtype).model
        assert not model.training
        for parameter in model.parameters():
            assert not parameter.requires_grad
            assert parameter.dtype == (dtype or torch.float32)


def test_on_cuda_a_target_keeps_the_dtype_of_its_checkpoint(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[torch.device] = []
    monkeypatch.setattr(loading, "place", lambda _, device: moved.append(device))
    gpu = torch.device("cuda", 0)
    for own in ("bfloat16", "float16", "float32"):
        change_config(broken, dtype=own)
        assert load_target(broken, device=gpu).model.dtype is getattr(torch, own)
        assert load_target(broken, device=torch.device("cpu")).model.dtype is torch.float32
        asked = load_target(broken, device=gpu, dtype=torch.float16)
        assert asked.model.dtype is torch.float16
    assert moved[0] == gpu


def test_end_tokens_are_those_of_generate(broken: Path) -> None:
    settings = broken / "generation_config.json"
    assert load_target(broken).end_token_ids == {257}
    settings.write_text('{"eos_token_id": [3, 5]}')
    assert load_target(broken).end_token_ids == {3, 5}
    settings.write_text('{"bos_token_id": 256}')  # config.json has an end, but `generate` has none
    assert load_target(broken).end_token_ids == frozenset()
    settings.unlink()
    assert load_target(broken).end_token_ids == {257}


def test_models_built_afterwards_have_their_experts(good: Path) -> None:
    load_target(good)
    whole = load_plain(good)
    names = [name for name, _ in whole.named_parameters() if "experts" in name]
    assert len(names) == 2 * 3


def test_loading_reports_nothing(good: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    load_target(good)
    assert capfd.readouterr() == ("", "")


def test_every_family_has_several_shards(good: Path) -> None:
    assert len(find_checkpoint(good).shards) > 1
    assert len(FAMILIES) >= 10


def _layers_of(checkpoint: Path) -> tuple[experts.MoeLayer, ...]:
    config = AutoConfig.from_pretrained(checkpoint)
    with experts.without_experts(config), torch.device("meta"):
        return experts.find_layers(AutoModelForCausalLM.from_config(config))
