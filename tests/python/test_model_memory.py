"""The table of models and memory is computed from configurations, and README.md has it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig

import model_memory
from families import FAMILIES, make_checkpoint
from model_memory import count_slots, draft_config, draft_sizes, known_rows, make_row, target_sizes
from spmoe.costs.memory_plan import weight_bytes
from spmoe.models.loading import load_draft, load_target
from synthetic_checkpoint import make_config

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2", "gpt_oss"])
def test_sizes_from_a_configuration_are_those_of_the_loaded_model(
    family: str, tmp_path: Path
) -> None:
    path = make_checkpoint(family, tmp_path / family)
    sizes = target_sizes(AutoConfig.from_pretrained(path))
    loaded = load_target(path, dtype=torch.bfloat16)
    assert sizes.weight_bytes == weight_bytes(loaded.model)
    assert (sizes.layer_count, sizes.expert_count) == (
        loaded.store.layer_count,
        loaded.store.expert_count,
    )
    item_bytes = {"float32": 4, "float16": 2, "bfloat16": 2}[loaded.store.dtype]
    assert sizes.blob_bytes * item_bytes == loaded.store.blob_bytes * 2


def test_a_draft_counts_whole(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path / "draft")
    sizes = draft_sizes(AutoConfig.from_pretrained(path))
    assert sizes.weight_bytes == weight_bytes(load_draft(path, dtype=torch.bfloat16))


def test_drafts_have_the_sizes_of_the_models_that_ship() -> None:
    shipped_gb = {"Mistral-7B": 14.5, "Phi-mini-MoE": 15.3}
    for name, size_gb in shipped_gb.items():
        found = draft_sizes(draft_config(name)).weight_bytes / 1e9
        assert found == pytest.approx(size_gb, rel=5e-3)


def test_more_memory_holds_more_experts_and_never_more_than_there_are() -> None:
    target = target_sizes(make_config("olmoe-1b-7b"))
    slots = [count_slots(target, None, gib * GIB) for gib in (1, 4, 8, 64)]
    assert slots[0] is None  # the dense part alone takes nearly all of it
    assert slots[1] < slots[2]
    assert slots[3] == 16 * 64
    assert slots[1] * target.blob_bytes + target.weight_bytes < 4 * GIB


def test_a_draft_takes_its_weights_and_caches_from_the_slots() -> None:
    target = target_sizes(make_config("qwen3-30b-a3b"))
    draft = draft_sizes(draft_config("Qwen3-0.6B"))
    alone, beside = (count_slots(target, d, 16 * GIB) for d in (None, draft))
    least = (draft.weight_bytes + draft.shape.cache_bytes(4096)) // target.blob_bytes
    assert least <= alone - beside <= least + 2


def test_the_readme_has_the_table_that_the_script_writes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    kept = text.partition(model_memory.BEGIN)[2].partition(model_memory.END)[0]
    assert kept == f"\n{model_memory.markdown(known_rows())}\n\n{model_memory.CAPTION}\n", (
        "run python bench/python/model_memory.py --md README.md"
    )


def test_the_script_takes_the_configuration_of_any_model(tmp_path: Path) -> None:
    config = FAMILIES["mixtral"]()
    config.save_pretrained(tmp_path)
    arguments = ["--config", str(tmp_path), "--draft-config", str(tmp_path)]
    result = CliRunner().invoke(model_memory.main, arguments, catch_exceptions=False)
    expected = target_sizes(config)
    count = expected.layer_count * expected.expert_count
    assert f"{count} (100%)" in result.output
    assert make_row("tiny", expected, None, None).slots == (count, count, count)
