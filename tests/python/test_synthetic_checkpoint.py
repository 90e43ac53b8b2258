"""Checkpoints with random weights are laid out as the hub's, of the sizes of shipped models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

import spmoe
from families import FAMILIES, greedy, make_checkpoint
from spmoe.errors import Error
from spmoe.models.loading import load_plain
from synthetic_checkpoint import SHAPES, expert_format, hub_tensors, make_config, write_checkpoint

# MoE layers, MB of an expert, GB of all routed experts, GB of the rest: as the models ship.
SHIPPED = {
    "mixtral-8x7b": (32, 352.3, 90.2, 3.21),
    "phi-3.5-moe": (32, 157.3, 80.5, 3.22),
    "deepseek-v2-lite": (26, 17.30, 28.8, 2.62),
    "qwen3-30b-a3b": (48, 9.44, 58.0, 3.08),
    "olmoe-1b-7b": (16, 12.58, 12.9, 0.95),
    "qwen1.5-moe-a2.7b": (24, 17.30, 24.9, 3.72),
    "gpt-oss-20b": (24, 49.78, 38.2, 3.60),
    "gpt-oss-120b": (36, 49.78, 229.4, 4.26),
}
LAYOUTS = sorted({str(sizes["model_type"]) for sizes in SHAPES.values()})


def shapes_in(directory: Path) -> dict[str, list[int]]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_the_sizes_of_the_models_that_ship(shape: str) -> None:
    layers, expert_mb, routed_gb, rest_gb = SHIPPED[shape]
    tensors = hub_tensors(make_config(shape))
    routed = {name: t for name, t in tensors.items() if ".experts." in name}
    routed_bytes = sum(t.nbytes for t in routed.values())
    numbers = {name.split("layers.")[1].split(".")[0] for name in routed}
    sizes = SHAPES[shape]
    experts = next(sizes[k] for k in sizes if k.startswith(("num_local_e", "num_experts", "n_rou")))
    assert len(numbers) == layers
    assert routed_bytes / layers / experts / 1e6 == pytest.approx(expert_mb, rel=1e-3)
    assert routed_bytes / 1e9 == pytest.approx(routed_gb, rel=2e-3)
    rest_bytes = sum(t.nbytes for t in tensors.values()) - routed_bytes
    assert rest_bytes / 1e9 == pytest.approx(rest_gb, rel=5e-3)


@pytest.mark.parametrize("family", LAYOUTS)
def test_files_are_laid_out_as_transformers_saves_them_for_the_hub(
    family: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "synthetic", FAMILIES[family](), shard_bytes=200_000)
    make_checkpoint(family, tmp_path / "saved")
    assert shapes_in(tmp_path / "synthetic") == shapes_in(tmp_path / "saved")
    index = json.loads((tmp_path / "synthetic" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


@pytest.mark.parametrize("family", LAYOUTS)
def test_spmoe_loads_it_and_writes_the_tokens_of_the_plain_model(
    family: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    write_checkpoint(path, FAMILIES[family](), shard_bytes=200_000)
    prompt = torch.tensor([[5, 6, 7, 8]])
    expected = greedy(load_plain(path), prompt, 4)
    with spmoe.load(path, expert_memory="50%") as engine:
        found = engine.generate(prompt[0].tolist(), max_new_tokens=4)
    assert found.token_ids == expected[: len(found.token_ids)]
    assert found.token_ids


def test_shrunk_shapes_open_as_stores_with_the_layers_asked_for(tmp_path: Path) -> None:
    for shape, sizes in SHAPES.items():
        path = tmp_path / shape
        config = make_config(shape, layers=2, shrink=128)
        total = write_checkpoint(path, config)
        experts = expert_format(config)
        files = sorted(path.glob("*.safetensors"))
        store = spmoe.open_store(files, interleaved=experts.interleaved)
        assert (store.layer_count, store.dtype) == (2, "bfloat16")
        assert (store.expert_count, store.hidden, store.inter) == experts.shape
        assert store.hidden == sizes["hidden_size"] // 128
        assert store.total_bytes < total
        shutil.rmtree(path)


def test_weights_are_random_and_the_seed_says_which(tmp_path: Path) -> None:
    config = FAMILIES["mixtral"]()
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        write_checkpoint(tmp_path / name, config, seed=seed)
    files = [tmp_path / name / "model.safetensors" for name in ("a", "again", "b")]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    with safe_open(files[0], "pt") as tensors:
        experts = [
            tensors.get_tensor(f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight")
            for i in (0, 1)
        ]
        assert tensors.get_tensor("model.norm.weight").eq(1).all()
    assert not experts[0].equal(experts[1])
    assert experts[0].float().std().item() == pytest.approx(0.2, rel=0.1)  # initializer_range


def test_a_disk_without_room_is_refused_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(Error, match=r"needs \d+ bytes \(.*\) in .*, but 1000 \(.*\) are free"):
        write_checkpoint(tmp_path / "model", FAMILIES["mixtral"]())
    assert not (tmp_path / "model").exists()


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(Error, match="is not empty: name another directory"):
        write_checkpoint(tmp_path, FAMILIES["mixtral"]())
    assert (tmp_path / "precious").exists()


def test_a_checkpoint_that_could_not_be_finished_is_removed(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "model", FAMILIES["mixtral"](), progress=stop)
    assert not (tmp_path / "model").exists()
