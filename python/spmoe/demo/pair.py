"""Makes the built-in pair once, in a cache directory."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from spmoe.config import default_cache
from spmoe.demo import VARIANTS, cache, dense, routing
from spmoe.demo.checkpoint import write_draft, write_target
from spmoe.demo.mixtral import NoisyCopies
from spmoe.demo.qwen2_moe import NoisyParts
from spmoe.demo.recipe import Recipe, fingerprint
from spmoe.errors import Error, InvalidArgument
from spmoe.prediction.calibration import calibration_text, tokenize_calibration
from spmoe.reporting.progress import Progress, silent

_RECIPES: dict[str, Recipe] = dict(zip(VARIANTS, (NoisyCopies(), NoisyParts()), strict=True))
_CODE_VERSION = 1  # raised when this package makes other bytes of the same recipe
_SETTINGS_BYTES = 10**7  # configuration and tokenizer, generously
_AutoModel: Any = AutoModelForCausalLM  # transformers does not type it


@dataclass(frozen=True, slots=True)
class Pair:
    """Checkpoint directories of a target and its draft."""

    target: Path
    draft: Path


def ensure_pair(
    variant: str, *, progress: Progress | None = None, cache_dir: Path | None = None
) -> Pair:
    """Return the built-in pair, making it first if the cache does not have it.

    The same bytes come out of every run on one machine. A run that is killed leaves nothing that
    a later one would take for a pair, and two processes at once make it once. A pair of an older
    recipe is replaced.

    Args:
        variant: "8x", a few large experts, or "32x", many small ones. They share the draft.
        progress: Called with a description, and done of total.
        cache_dir: Where; None means the folder that ``SPMOE_CACHE`` names, or else the user's
            cache folder.

    Raises:
        InvalidArgument: There is no such variant, the package with the weights is not installed,
            or the cache folder is not writable.
        CheckpointError: The installed weights are damaged.
        Error: The disk is full.
    """
    recipe = _recipe(variant)
    root = (default_cache() if cache_dir is None else Path(cache_dir)) / "demo"
    report = progress or silent
    pair = Pair(target=root / variant, draft=root / "draft")
    draft_print = fingerprint(_CODE_VERSION, dense.GGUF_SHA256)
    target_print = fingerprint(_CODE_VERSION, dense.GGUF_SHA256, calibration_text(), recipe)

    wanted = {pair.draft: draft_print, pair.target: target_print}
    if not _missing(wanted):
        return pair
    with _faults_of_disk(root), cache.only_process(root, report):
        if missing := _missing(wanted):  # else another process has made them
            _make(pair, missing, recipe, report)
    return pair


def describe(variant: str) -> str:
    """Return what a pair is and is not.

    Raises:
        InvalidArgument: There is no such variant.
    """
    recipe = _recipe(variant)
    return (
        f"The built-in pair with the target {variant}.\n\n"
        "Draft: SmolLM2-135M-Instruct (Apache-2.0), a dense Llama model, from the Python package "
        f"{dense.PACKAGE} {dense.VERSION}, where its weights are quantized to 4 bits; here they "
        "are bfloat16 again.\n\n"
        f"Target: a Mixture-of-Experts model that spmoe makes from the draft. {recipe.describe()} "
        "The routers are clusters of what each layer's feed-forward network reads on a text that "
        "comes with spmoe, with a seeded popularity of each expert: routing depends on the text "
        "and is skewed, as in trained models.\n\n"
        "What it is not: a trained Mixture-of-Experts model. Its text is about as good as the "
        "draft's, a very small model that is often wrong. And since the target was made from its "
        "draft, the draft's tokens are accepted, and its predictions of experts are right, more "
        "often than those of a pair that was trained apart: such figures are of an easy case."
    )


def make_routers(source: dense.Dense, recipe: Recipe, *, progress: Progress) -> list[Tensor]:
    """Return the rows [experts, hidden] of each layer's router, float32; always the same."""
    documents = tokenize_calibration(source.tokenizer)
    routers = []
    with routing.one_thread():
        layers = routing.ffn_inputs(source.model, documents, progress=progress)
        for layer, inputs in enumerate(layers):
            progress("clustering what the layers read", layer, len(layers))
            rng = np.random.default_rng([recipe.seed, layer, recipe.experts])
            routers.append(
                routing.router_rows(inputs, recipe.experts, popularity=recipe.popularity, rng=rng)
            )
    progress("clustering what the layers read", len(layers), len(layers))
    return routers


def _missing(wanted: dict[Path, str]) -> dict[Path, str]:
    """Return the directories that are not whole, with their fingerprints."""
    return {path: key for path, key in wanted.items() if not cache.is_complete(path, key)}


def _make(pair: Pair, missing: dict[Path, str], recipe: Recipe, report: Progress) -> None:
    description = "reading the draft's weights"
    report(description, 0, 1)
    source = dense.load_dense()
    report(description, 1, 1)
    configs = {
        pair.draft: source.model.config,
        pair.target: recipe.config(source.model.config),
    }
    for path in missing:
        cache.discard(path)  # of an older recipe, or damaged: its space is needed
    needed_bytes = sum(_checkpoint_bytes(configs[path]) for path in missing)
    cache.check_space(pair.target.parent, needed_bytes, "the built-in pair")
    if pair.draft in missing:
        with cache.making(pair.draft, missing[pair.draft]) as directory:
            write_draft(directory, source)
    if pair.target in missing:
        routers = make_routers(source, recipe, progress=report)
        with cache.making(pair.target, missing[pair.target]) as directory:
            write_target(directory, source, recipe=recipe, routers=routers, progress=report)


def _recipe(variant: str) -> Recipe:
    if variant not in _RECIPES:
        raise InvalidArgument(
            f'there is no built-in pair "{variant}": choose from {", ".join(_RECIPES)}'
        )
    return _RECIPES[variant]


def _checkpoint_bytes(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        skeleton = _AutoModel.from_config(config, trust_remote_code=False)
    weights: int = sum(parameter.numel() for parameter in skeleton.parameters())
    return weights * torch.bfloat16.itemsize + _SETTINGS_BYTES


@contextmanager
def _faults_of_disk(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Error(
                f"the disk became full while the built-in pair was made in {root}, and what was "
                f"half made is removed; {cache.DISK_CURE}"
            ) from error
        raise InvalidArgument(
            f"the built-in pair cannot be made in {root} ({error}); set SPMOE_CACHE to a folder "
            "that you can write to"
        ) from error
