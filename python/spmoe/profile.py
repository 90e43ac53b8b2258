"""Measured costs of one machine and pair, kept in the cache folder until something changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch

from spmoe.config import default_cache
from spmoe.costs import Costs
from spmoe.devices import device_model
from spmoe.errors import InvalidArgument
from spmoe.layer_map import LayerMap
from spmoe.metrics import cpu_model
from spmoe.models.checkpoint import find_checkpoint

log = logging.getLogger("spmoe")

_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a profile holds for. It is stale once one of these differs.

    Attributes:
        pair: Digest of the configurations and sizes of target and draft.
        machine: Processor, cores, versions.
        settings: What of the settings changes costs: dtype, device, pinned memory, pacing.
    """

    pair: str
    machine: dict[str, str | int]
    settings: dict[str, str | float]

    @classmethod
    def of(
        cls,
        target: str | PathLike[str],
        draft: str | PathLike[str] | None,
        *,
        dtype: torch.dtype,
        device: str,
        link_gbps: float,
        pinned_memory: int | str = "auto",
    ) -> Self:
        """Return the fingerprint of a pair, on this machine, with these settings."""
        models = [_describe(model) for model in (target, draft) if model is not None]
        return cls(
            pair=hashlib.sha256(json.dumps(models).encode()).hexdigest()[:16],
            machine={
                "cpu": cpu_model(),
                "device": device_model(device),
                "cores": len(os.sched_getaffinity(0)),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "spmoe": version("spmoe"),
            },
            settings={
                "dtype": str(dtype),
                "device": device,
                "pinned_memory": pinned_memory,
                "link_gbps": link_gbps,
            },
        )

    @property
    def path(self) -> Path:
        """Where the profile of this pair and these settings is kept."""
        settings = json.dumps([self.pair, self.settings], sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        return default_cache() / "profiles" / f"{digest}.json"

    @property
    def layer_map_path(self) -> Path:
        """Where the `LayerMap` of this pair is kept."""
        return default_cache() / "profiles" / f"{self.pair}.safetensors"


@dataclass(frozen=True, slots=True)
class Profile:
    """Costs and how far their samples lie apart.

    Attributes:
        costs: Medians; what copies take from compute is one standard error more.
        spread: Name of a cost -> interquartile range of its samples over their median.
        fingerprint: What they hold for.
        layer_map: Of a draft of another depth or width than the target; it holds for the pair.
    """

    costs: Costs
    spread: dict[str, float]
    fingerprint: Fingerprint
    layer_map: LayerMap | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all but the map as JSON knows it."""
        return {
            "costs": asdict(self.costs),
            "spread": self.spread,
            "fingerprint": asdict(self.fingerprint),
        }

    def save(self) -> Path:
        """Write it to its place in the cache folder, whole or not at all; return the place.

        The map goes beside it.
        """
        path = self.fingerprint.path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"format": _FORMAT} | self.as_dict(), indent=1))
        partial.replace(path)
        if self.layer_map is not None:
            self.layer_map.save(self.fingerprint.layer_map_path, self.fingerprint.pair)
        return path


def find_profile(fingerprint: Fingerprint) -> Profile | None:
    """Return the profile kept for this fingerprint, None if there is none.

    Raises:
        InvalidArgument: There is one, but it is stale or damaged; the message says which.
    """
    try:
        kept = json.loads(fingerprint.path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        kept = {}
    if kept.get("format") != _FORMAT:
        raise InvalidArgument(
            f"{fingerprint.path} is not a profile of this version: run `spmoe profile` again"
        )
    for name, found in fingerprint.machine.items():
        if (measured := kept["fingerprint"]["machine"].get(name)) != found:
            raise InvalidArgument(
                f'the profile was measured with {name} "{measured}", but here it is "{found}": '
                "run `spmoe profile` again"
            )
    costs = kept["costs"]
    for name in ("layer_s", "copy_s"):
        costs[name] = {int(at): seconds for at, seconds in costs[name].items()}
    return Profile(Costs(**costs), kept["spread"], fingerprint)


def known_costs(fingerprint: Fingerprint) -> Costs | None:
    """Return the costs kept for this fingerprint; None, with a warning if there are stale ones."""
    try:
        kept = find_profile(fingerprint)
    except InvalidArgument as stale:
        log.warning("%s; estimating instead", stale)
        return None
    return kept.costs if kept is not None else None


def known_layer_map(fingerprint: Fingerprint) -> LayerMap | None:
    """Return the map kept for this pair; None, with a warning if there is a stale one."""
    if not fingerprint.layer_map_path.exists():
        return None
    try:
        return LayerMap.load(fingerprint.layer_map_path, fingerprint.pair)
    except InvalidArgument as stale:
        log.warning("%s", stale)
        return None


def _describe(model: str | PathLike[str]) -> Mapping[str, Any]:
    checkpoint = find_checkpoint(model)
    return {
        "config": json.loads((checkpoint.directory / "config.json").read_text(encoding="utf-8")),
        "files": {shard.name: shard.stat().st_size for shard in checkpoint.shards},
    }
