"""Which files are a model's weights: chosen once, in transformers' own order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spmoe
from families import greedy, make_checkpoint
from spmoe.errors import CheckpointError, InvalidArgument
from spmoe.models.checkpoint import find_checkpoint
from spmoe.models.loading import load_draft, load_plain, load_target, load_tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COUNT = 6
PROMPT = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of another model of the same shape, in one file."""
    folder = tmp_path_factory.mktemp("other")
    tensors: dict[str, torch.Tensor] = {}
    for shard in make_checkpoint("qwen3_moe", folder, seed=7).glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file(tensors, folder / "one.safetensors", metadata={"format": "pt"})
    return folder / "one.safetensors"


@pytest.fixture
def model(target_path: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint of several shards and an index."""
    return Path(shutil.copytree(target_path, tmp_path / "model"))


def edit(file: Path, change: Callable[[dict[str, object]], object]) -> None:
    kept = json.loads(file.read_text())
    change(kept)
    file.write_text(json.dumps(kept))


def text_by_transformers(model: Path) -> list[int]:
    whole = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, experts_implementation="eager"
    )
    return greedy(whole, PROMPT, COUNT)


def assert_all_readers_agree(model: Path) -> None:
    expected = text_by_transformers(model)
    assert greedy(load_plain(model), PROMPT, COUNT) == expected
    assert greedy(load_draft(model), PROMPT, COUNT) == expected
    with spmoe.load(model, expert_memory="50%") as engine:
        iterations = engine.iterate(PROMPT[0].tolist(), max_new_tokens=COUNT, draft_length=0)
        assert [token for iteration in iterations for token in iteration.tokens] == expected


def test_a_single_file_goes_before_an_index_as_in_transformers(model: Path, one_file: Path) -> None:
    shards = text_by_transformers(model)
    shutil.copy(one_file, model / SINGLE)
    assert find_checkpoint(model).shards == (model / SINGLE,)
    assert text_by_transformers(model) != shards
    assert_all_readers_agree(model)


def test_a_file_that_the_config_names_goes_before_all_others(model: Path, one_file: Path) -> None:
    shards = text_by_transformers(model)
    shutil.copy(one_file, model / "chosen.safetensors")
    edit(model / "config.json", lambda kept: kept.update(transformers_weights="chosen.safetensors"))
    assert text_by_transformers(model) != shards
    assert_all_readers_agree(model)


def test_an_index_that_the_config_names_goes_before_a_single_file(
    model: Path, one_file: Path
) -> None:
    chosen = "chosen.safetensors.index.json"
    (model / INDEX).rename(model / chosen)
    shutil.copy(one_file, model / SINGLE)
    edit(model / "config.json", lambda kept: kept.update(transformers_weights=chosen))
    assert len(find_checkpoint(model).shards) > 1
    assert_all_readers_agree(model)


def test_a_stale_index_beside_a_single_file_is_not_used(model: Path, one_file: Path) -> None:
    for shard in model.glob("model-*.safetensors"):
        shard.unlink()
    shutil.copy(one_file, model / SINGLE)
    assert_all_readers_agree(model)


@pytest.mark.parametrize("load", [load_target, load_draft, load_plain])
def test_shards_that_are_not_those_of_the_index_are_refused(
    model: Path, load: Callable[[Path], object]
) -> None:
    def swap(kept: dict[str, object]) -> None:
        weights = kept["weight_map"]
        assert isinstance(weights, dict)
        first, last = min(weights.values()), max(weights.values())
        other = {first: last, last: first}
        kept["weight_map"] = {name: other.get(file, file) for name, file in weights.items()}

    edit(model / INDEX, swap)
    with pytest.raises(CheckpointError, match=r"lacks the tensor .* of different checkpoints"):
        load(model)


@pytest.mark.parametrize("load", [load_target, load_draft, load_plain])
def test_a_tensor_in_two_shards_is_refused(model: Path, load: Callable[[Path], object]) -> None:
    weights = json.loads((model / INDEX).read_text())["weight_map"]
    norm = "model.norm.weight"
    other = next(model / file for file in weights.values() if file != weights[norm])
    save_file(load_file(other) | {norm: torch.zeros(64)}, other, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{other.name} holds the tensor {norm} \(1 such"):
        load(model)
    edit(model / INDEX, lambda kept: kept["weight_map"].pop(norm))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=rf"holds the tensor {norm} twice, in model-"):
        load(model)


WRONG_NAMES = ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\0b", 5]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_weight_file_outside_the_models_directory_is_refused(
    model: Path, one_file: Path, name: object
) -> None:
    shutil.copy(one_file, model.parent / "outside.safetensors")
    edit(model / "config.json", lambda kept: kept.update(transformers_weights=name))
    with pytest.raises(CheckpointError, match=r"transformers_weights .*own directory only"):
        load_target(model)
    edit(model / "config.json", lambda kept: kept.pop("transformers_weights"))

    def rename_all(kept: dict[str, object]) -> None:
        kept["weight_map"] = dict.fromkeys(kept["weight_map"], name)  # type: ignore[call-overload]

    edit(model / INDEX, rename_all)
    for load in (load_target, load_draft):
        with pytest.raises(CheckpointError, match=r"index.json names .*own directory only"):
            load(model)


def test_weights_that_are_no_safetensors_are_refused(model: Path) -> None:
    (model / "weights.bin").touch()
    edit(model / "config.json", lambda kept: kept.update(transformers_weights="weights.bin"))
    with pytest.raises(CheckpointError, match=r"weights.bin as transformers_weights, which is no"):
        load_target(model)


def test_an_adapter_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"holds an adapter .*merge_and_unload"):
        load_target(model)


def test_a_missing_shard_is_named(model: Path) -> None:
    shard = find_checkpoint(model).shards[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}, one of the \d+ weight files"):
        load_target(model)


def test_a_checkpoint_of_bin_files_only_is_refused_with_the_cure(model: Path) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"only pytorch_model.bin.*save_pretrained"):
        load_target(model)


def test_a_hub_id_that_is_not_in_the_cache_is_refused_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_target, load_draft, load_tokenizer):
        with pytest.raises(InvalidArgument, match=r'"nobody/no-such-model" is neither a directory'):
            load("nobody/no-such-model")


def test_of_a_hub_id_only_the_weights_that_its_index_names_are_fetched(
    target_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def fetch(model: str, allow_patterns: list[str]) -> str:
        assert model == "owner/name"
        asked.append(allow_patterns)
        return str(target_path)

    monkeypatch.setattr("spmoe.models.checkpoint.snapshot_download", fetch)
    shards = find_checkpoint("owner/name").shards
    assert not any("safetensors" in pattern for pattern in asked[0])
    assert asked[1] == [*asked[0], *(shard.name for shard in shards)]


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"neither a directory nor a model"):
        load_target(tmp_path / "absent")
