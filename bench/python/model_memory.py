"""How many experts of a model fit in memory, with a draft beside it? The table of README.md.

Computed from configurations alone: no weight is downloaded, read or made. Memory is divided as
`spmoe.load` does with ``expert_memory="auto"``, with weights, activations and caches in bfloat16.

    python bench/python/model_memory.py --md README.md
    python bench/python/model_memory.py --config path/to/target --draft-config path/to/draft
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from spmoe.config import format_bytes
from spmoe.costs.memory_plan import divide_memory
from spmoe.errors import OutOfMemory
from spmoe.models.experts import IMPLEMENTATION, describe, find_layers, without_experts
from spmoe.models.shapes import ModelShape
from spmoe.system.expert_memory import slot_bytes
from synthetic_checkpoint import make_config

BEGIN, END = "<!-- model_memory.py: begin -->\n", "<!-- model_memory.py: end -->\n"
FREE_GIB = (8, 16, 24)
_GIB = 1 << 30

# Each draft's own config.json, as far as it sets sizes.
DRAFTS: dict[str, dict[str, Any]] = {
    "Mistral-7B": {
        "model_type": "mistral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "Phi-mini-MoE": {
        "model_type": "phimoe",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 960,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "vocab_size": 32064,
        "attention_bias": True,
        "lm_head_bias": True,
        "tie_word_embeddings": False,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen1.5-0.5B": {
        "model_type": "qwen2",
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}

# Name, shape, drafts to show beside it.
TARGETS: tuple[tuple[str, str, tuple[str | None, ...]], ...] = (
    ("Mixtral-8x7B", "mixtral-8x7b", (None, "Mistral-7B")),
    ("Phi-3.5-MoE", "phi-3.5-moe", (None, "Phi-mini-MoE")),
    ("Qwen3-30B-A3B", "qwen3-30b-a3b", ("Qwen3-0.6B",)),
    ("DeepSeek-V2-Lite", "deepseek-v2-lite", (None,)),
    ("Qwen1.5-MoE-A2.7B", "qwen1.5-moe-a2.7b", ("Qwen1.5-0.5B",)),
    ("OLMoE-1B-7B", "olmoe-1b-7b", (None,)),
    ("gpt-oss-20b", "gpt-oss-20b", (None,)),
    ("gpt-oss-120b", "gpt-oss-120b", (None,)),
)
QUANTIZED = {"gpt-oss-20b": "MXFP4", "gpt-oss-120b": "MXFP4"}  # the files on the hub

_AutoModel: Any = AutoModelForCausalLM  # transformers does not type it


@dataclass(frozen=True, slots=True)
class Sizes:
    """The memory of a model by its configuration. An `ExpertSizes`; bytes in bfloat16.

    Attributes:
        shape: For caches and scratch.
        weight_bytes: All weights and buffers; of a target, those outside its routed experts.
        layer_count: MoE layers; 0 of a draft.
        expert_count: Of a layer.
        blob_bytes: One expert.
    """

    shape: ModelShape
    weight_bytes: int
    layer_count: int = 0
    expert_count: int = 0
    blob_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All routed experts."""
        return self.layer_count * self.expert_count * self.blob_bytes


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `slots` has a count for each of `FREE_GIB`; None: it does not fit."""

    target: str
    draft: str | None
    sizes: Sizes
    draft_bytes: int
    slots: tuple[int | None, ...]
    quantized: str | None = None


def target_sizes(config: PreTrainedConfig) -> Sizes:
    """Return the sizes of a target without its experts, and of these."""
    with without_experts(config), torch.device("meta"):
        model = _AutoModel.from_config(
            config,
            dtype=torch.bfloat16,
            experts_implementation=IMPLEMENTATION,
            trust_remote_code=False,
        )
    layers = find_layers(model)
    expert_count, _, _ = describe(layers).shape
    experts: Any = layers[0].experts
    tensors = [value for value in vars(experts).values() if isinstance(value, torch.Tensor)]
    return Sizes(
        ModelShape.of(model),
        _weight_bytes(model),
        layer_count=len(layers),
        expert_count=expert_count,
        blob_bytes=sum(tensor.numel() for tensor in tensors) * 2 // expert_count,
    )


def draft_sizes(config: PreTrainedConfig) -> Sizes:
    """Return the sizes of a draft, which is loaded whole."""
    with torch.device("meta"):
        model = _AutoModel.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    return Sizes(ModelShape.of(model), _weight_bytes(model))


def count_slots(target: Sizes, draft: Sizes | None, free: int) -> int | None:
    """Return how many experts fit in ``free`` bytes; None: not even those of one token."""
    try:
        plan = divide_memory(
            [target.shape, *([draft.shape] if draft is not None else [])],
            target,
            expert_memory="auto",
            experts_per_token=target.shape.experts_per_token,
            dense_bytes=target.weight_bytes,
            draft_bytes=draft.weight_bytes if draft is not None else 0,
            free=free,
        )
    except OutOfMemory:
        return None
    return min(plan.expert_bytes // slot_bytes(target, 1), target.layer_count * target.expert_count)


def known_rows() -> list[Row]:
    """Return the table's rows."""
    rows = []
    for name, shape, drafts in TARGETS:
        target = target_sizes(make_config(shape))
        for draft_name in drafts:
            draft = None if draft_name is None else draft_sizes(draft_config(draft_name))
            rows.append(make_row(name, target, draft_name, draft, QUANTIZED.get(shape)))
    return rows


def draft_config(name: str) -> PreTrainedConfig:
    """Return the configuration of one of `DRAFTS`."""
    return AutoConfig.for_model(**DRAFTS[name])


def make_row(
    name: str,
    target: Sizes,
    draft_name: str | None,
    draft: Sizes | None,
    quantized: str | None = None,
) -> Row:
    """Return a row with the slots at each of `FREE_GIB`."""
    slots = tuple(count_slots(target, draft, gib * _GIB) for gib in FREE_GIB)
    return Row(name, draft_name, target, draft.weight_bytes if draft else 0, slots, quantized)


def markdown(rows: list[Row]) -> str:
    """Return the table in Markdown."""
    head = ["target", "draft", "dense part", "draft", "experts"]
    head += [f"slots, {gib} GiB free" for gib in FREE_GIB]
    lines = [[*head, "today"], ["---"] * (len(head) + 1)]
    for row in rows:
        sizes = row.sizes
        count = sizes.layer_count * sizes.expert_count
        lines.append(
            [
                row.target,
                row.draft or "none",
                format_bytes(sizes.weight_bytes),
                format_bytes(row.draft_bytes) if row.draft_bytes else "-",
                f"{count} of {format_bytes(sizes.blob_bytes)}: {format_bytes(sizes.total_bytes)}",
                *(_slots(slots, count) for slots in row.slots),
                "supported"
                if row.quantized is None
                else f"refused as shipped ({row.quantized}); supported in bfloat16",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


CAPTION = """\
By `python bench/python/model_memory.py --md README.md`, from configurations alone: weights,
activations and caches in bfloat16, as on a GPU; 4096 tokens of context; the memory that is free
before anything is loaded. A slot holds one expert; the share of all experts is in brackets; "-"
means that not even the experts of one token fit. "Supported" means that the family passes the check
above at a tiny size and that its weight files are read; none of these models was run at its full
size. `--config` and `--draft-config` take the folders of other models.
"""


def _slots(slots: int | None, count: int) -> str:
    return "-" if slots is None else f"{slots} ({slots / count:.0%})"


def _weight_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@click.command()
@click.option("--config", type=click.Path(exists=True), help="Folder or config.json of a target.")
@click.option("--draft-config", type=click.Path(exists=True), help="Of its draft.")
@click.option("--md", type=click.Path(path_type=Path), help="Put the table into this document.")
def main(config: str | None, draft_config: str | None, md: Path | None) -> None:
    """Print how many experts fit: of known models, or of the one that --config names."""
    if config is None:
        rows = known_rows()
    else:
        draft = draft_sizes(_read(draft_config)) if draft_config is not None else None
        rows = [make_row(config, target_sizes(_read(config)), draft_config, draft)]
    table = markdown(rows)
    print(table)
    if md is not None:
        text = md.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        written = f"{before}{BEGIN}\n{table}\n\n{CAPTION}\n{END}{after}"
        md.write_text(written, encoding="utf-8")


def _read(path: str) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return config


if __name__ == "__main__":
    main()
