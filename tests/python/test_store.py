"""`open_store`: which tensors are experts', and which arguments are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import make_checkpoint
from spmoe.errors import CheckpointError, InvalidArgument
from spmoe.store import open_store

OWN_NAMES = {
    "gate": "h{layer}.ffn[{expert}].v",
    "up": "h{layer}.ffn[{expert}].u",
    "down": "h{layer}.ffn[{expert}].o",
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return sorted(make_checkpoint("mixtral", tmp_path / "mixtral").glob("*.safetensors"))


def rename(files: list[Path], names: dict[str, str]) -> None:
    """Call mixtral's experts by ``names``, in the files."""
    parts = {"w1.weight": "gate", "w3.weight": "up", "w2.weight": "down"}
    for file in files:
        renamed = {}
        for name, tensor in load_file(file).items():
            layer, _, rest = name.removeprefix("model.layers.").partition(
                ".block_sparse_moe.experts."
            )
            expert, _, part = rest.partition(".")
            if part in parts:
                known = names[parts[part]].format(layer=layer, expert=expert)
                renamed[known] = tensor
            else:
                renamed[name] = tensor
        save_file(renamed, file, metadata={"format": "pt"})


def test_experts_are_found_by_names_that_are_given(files: list[Path]) -> None:
    whole = open_store(files)
    rename(files, OWN_NAMES)
    with pytest.raises(InvalidArgument, match=r"no tensor in .* is a routed expert's.*the names"):
        open_store(files)
    store = open_store(files, names=OWN_NAMES)
    assert (store.layer_count, store.expert_count) == (whole.layer_count, whole.expert_count)
    assert (store.hidden, store.inter) == (whole.hidden, whole.inter)
    assert "h2.ffn[7].o" in store.tensor_names
    assert open_store(files, names=OWN_NAMES, layers=[2]).layer_count == 1


def test_fused_tensors_are_found_by_names_that_are_given(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    tensors = {"0/in": torch.zeros(4, 12, 8), "0/out": torch.zeros(4, 8, 6)}
    save_file(tensors | {"0/in.scale": torch.zeros(1)}, file)
    store = open_store([file], names={"gate_up": "{layer}/in", "down": "{layer}/out"})
    assert (store.expert_count, store.hidden, store.inter) == (4, 8, 6)
    assert store.tensor_names == ["0/in", "0/out"]


def test_a_tensor_that_the_given_names_lack_is_named_by_its_usual_name(files: list[Path]) -> None:
    rename(files, OWN_NAMES | {"up": "h{layer}.other[{expert}].u"})
    with pytest.raises(CheckpointError, match=r"layers.0.experts.0.up_proj.weight is missing"):
        open_store(files, names=OWN_NAMES)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gate", "up", "down"], r"names is \['gate', .* not a mapping: give gate, up and down"),
        ({"gate": "{layer}{expert}a"}, r"names has 'gate': give gate, up and down"),
        (OWN_NAMES | {"gat": "x"}, r"'gat': give gate, up and down"),
        (OWN_NAMES | {"up": "h.ffn{expert}.u"}, r'"up", .* needs \{layer\} once'),
        (OWN_NAMES | {"up": "h{layer}.u"}, r'"up", .* needs \{expert\} once'),
        (
            {"gate_up": "{layer}.{expert}", "down": "{layer}"},
            r"needs \{expert\} left out, for it names a tensor of all experts",
        ),
        (
            {part: f"model.{name}" for part, name in OWN_NAMES.items()},
            r"no tensor in \d+ files fits the names given, such as 'model.h",
        ),
    ],
)
def test_names_that_cannot_be_meant_are_refused(
    files: list[Path], names: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        open_store(files, names=names)


def test_files_must_be_a_list_of_files(files: list[Path]) -> None:
    folder = files[0].parent
    for wrong in (str(files[0]), files[0], None, 5):
        with pytest.raises(InvalidArgument, match=r"not a list of files: pass every shard"):
            open_store(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"is a folder: pass every shard.*glob"):
        open_store([folder])
    with pytest.raises(InvalidArgument, match=r"5 in files is not a path"):
        open_store([5])  # type: ignore[list-item]
    with pytest.raises(InvalidArgument, match=r"no files were given"):
        open_store([])
    with pytest.raises(CheckpointError, match=r"absent.safetensors: No such file"):
        open_store([folder / "absent.safetensors"])
    with pytest.raises(CheckpointError, match=r"absent.safetensors: No such file"):
        open_store([*files, folder / "absent.safetensors"], names={
            "gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
            "up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
            "down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        })  # fmt: skip


@pytest.mark.parametrize("layers", [[-1], [1 << 32], [1.5], ["1"], 3, None])
def test_layers_must_be_layer_numbers(files: list[Path], layers: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^layers (is|has) "):
        open_store(files, layers=layers)  # type: ignore[arg-type]
