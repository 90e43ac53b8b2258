"""`open_store`: where a model's routed experts rest, found by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from os import PathLike, fsdecode
from pathlib import Path

from safetensors import SafetensorError, safe_open

from spmoe._core import ExpertStore
from spmoe.errors import InvalidArgument

# Content of a tensor -> its name in the native store.
_SEPARATE = {
    "gate": "layers.{layer}.experts.{expert}.gate_proj.weight",
    "up": "layers.{layer}.experts.{expert}.up_proj.weight",
    "down": "layers.{layer}.experts.{expert}.down_proj.weight",
    "gate_bias": "layers.{layer}.experts.{expert}.gate_proj.bias",
    "up_bias": "layers.{layer}.experts.{expert}.up_proj.bias",
    "down_bias": "layers.{layer}.experts.{expert}.down_proj.bias",
}
_FUSED = {
    "gate_up": "layers.{layer}.experts.gate_up_proj",
    "down": "layers.{layer}.experts.down_proj",
    "gate_up_bias": "layers.{layer}.experts.gate_up_proj_bias",
    "down_bias": "layers.{layer}.experts.down_proj_bias",
}
_CURE = 'pass every shard, for instance sorted(pathlib.Path(folder).glob("*.safetensors"))'


def open_store(
    files: Sequence[str | PathLike[str]],
    *,
    layers: Iterable[int] = (),
    interleaved: bool = False,
    names: Mapping[str, str] | None = None,
) -> ExpertStore:
    """Find the routed experts in the safetensors shards of a checkpoint; reads headers only.

    Tensors of these names are experts', whatever precedes ``layers``::

        layers.<layer>.<...>.experts.<expert>.{gate,up,down}_proj.{weight,bias}
        layers.<layer>.<...>.experts.<expert>.{w1,w3,w2}.{weight,bias}       gate, up, down
        layers.<layer>.<...>.experts.{gate_up,down}_proj[_bias]              of all experts
        layers.<layer>.<...>.experts.{fc1,fc2}.weight                        of all experts
        layers.<layer>.<...>.block_sparse_moe.{input,output}_linear.weight   of all experts

    Gate and up are [inter, hidden] and down is [hidden, inter]; a tensor of all experts has one
    more dimension in front, in it gate and up are one tensor of ``2 * inter`` rows, and it may
    be transposed.

    Args:
        files: Every shard.
        layers: Layer numbers, as in the tensors' names, in the order of MoE layers; empty: all.
        interleaved: Gate and up alternate in the fused tensor (gpt_oss).
        names: The tensors' names, if they are others: a template with ``{layer}`` and
            ``{expert}`` for each of "gate", "up" and "down"; or, with ``{layer}`` alone, for
            "gate_up" and "down" of all experts. Biases are "gate_bias" and so on. Tensors that
            fit no template are left alone, and messages call the others as in the list above.

    Raises:
        CheckpointError: A shard is damaged or lacks a tensor, or experts differ in shape or dtype.
        InvalidArgument: No tensor is an expert's, or an argument is wrong.
    """
    paths = _check_files(files)
    known = {} if names is None else _known_names(paths, names)
    return ExpertStore(paths, _check_layers(layers), bool(interleaved), known)


def _check_files(files: Sequence[str | PathLike[str]]) -> list[str]:
    if isinstance(files, str | bytes | PathLike) or not isinstance(files, Iterable):
        raise InvalidArgument(f"files is {files!r}, not a list of files: {_CURE}")
    paths = []
    for file in files:
        if not isinstance(file, str | bytes | PathLike):
            raise InvalidArgument(f"{file!r} in files is not a path: {_CURE}")
        paths.append(fsdecode(file))
        if Path(paths[-1]).is_dir():
            raise InvalidArgument(f"{paths[-1]} in files is a folder: {_CURE}")
    return paths


def _check_layers(layers: Iterable[int]) -> list[int]:
    try:
        numbers = [index(layer) for layer in layers]
    except TypeError as error:
        raise InvalidArgument(f"layers is {layers!r}, not a list of layer numbers") from error
    if wrong := [number for number in numbers if not 0 <= number < 1 << 32]:
        raise InvalidArgument(f"layers has {wrong[0]}, which is no layer number: count from 0")
    return numbers


def _known_names(paths: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Return every tensor in the files that fits a template, with its native name."""
    if not isinstance(names, Mapping):
        raise InvalidArgument(f"names is {names!r}, not a mapping: give gate, up and down a name")
    known = _FUSED if "gate_up" in names else _SEPARATE
    required = [part for part in known if not part.endswith("bias")]
    if not names.keys() <= known.keys() or not names.keys() >= set(required):
        raise InvalidArgument(
            f"names has {', '.join(map(repr, names))}: give gate, up and down, or gate_up and "
            "down, and their biases (gate_bias, ...) if there are some"
        )
    patterns = {known[part]: _pattern(part, names[part], known[part]) for part in names}
    found = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = list(file.keys())
        except (OSError, SafetensorError):
            continue  # the native store says what is wrong with it
        for tensor in tensors:
            for native, pattern in patterns.items():
                if fit := pattern.fullmatch(tensor):
                    found[tensor] = native.format(**fit.groupdict())
    if not found:
        raise InvalidArgument(
            f"no tensor in {len(list(paths))} files fits the names given, such as "
            f"{next(iter(names.values()))!r}: compare them with the names in the files"
        )
    return found


def _pattern(part: str, template: str, native: str) -> re.Pattern[str]:
    pattern = re.escape(str(template))
    for place in ("layer", "expert"):
        wanted = native.count(f"{{{place}}}")
        if str(template).count(f"{{{place}}}") != wanted:
            raise InvalidArgument(
                f'the name of "{part}", {template!r}, needs {{{place}}} '
                f"{'once' if wanted else 'left out, for it names a tensor of all experts'}"
            )
        pattern = pattern.replace(rf"\{{{place}\}}", rf"(?P<{place}>\d+)")
    return re.compile(pattern)
