"""Measured costs of one machine and pair, kept in the cache folder until something changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch

from spmoe.config import default_cache
from spmoe.costs.costs import Costs
from spmoe.errors import Error, InvalidArgument
from spmoe.models.checkpoint import find_checkpoint
from spmoe.models.loading import TargetModel
from spmoe.prediction.layer_map import LayerMap
from spmoe.settings import Settings
from spmoe.system.devices import device_model
from spmoe.system.machine import cpu_model, package_version
from spmoe.system.whole_file import write_whole

log = logging.getLogger("spmoe")

_FORMAT = 2

# Kept costs past these are damaged, and sums of them could overflow.
_SHORTEST_S, _LONGEST_S = 1e-12, 1e6
_MOST_ROWS = 1 << 16
_MOST_BYTES = 1 << 48


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The pair, machine and settings of a profile, which is stale once one of these differs.

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
        settings: Settings,
        *,
        dtype: torch.dtype,
    ) -> Self:
        """Return the fingerprint of a pair whose target has a dtype, with these settings here."""
        models = [_describe(model) for model in (target, draft) if model is not None]
        return cls(
            pair=hashlib.sha256(json.dumps(models).encode()).hexdigest()[:16],
            machine={
                "cpu": cpu_model(),
                "device": device_model(settings.device),
                "cores": len(os.sched_getaffinity(0)),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "spmoe": package_version("spmoe") or "unknown",
            },
            settings={
                "dtype": str(dtype),
                "device": settings.device,
                "pinned_memory": settings.pinned_memory,
                "link_gbps": settings.link_gbps,
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

        Raises:
            Error: The cache folder cannot be written, or its disk is full.
        """
        path = self.fingerprint.path
        text = json.dumps({"format": _FORMAT} | self.as_dict(), indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.layer_map is not None:
                self.layer_map.save(self.fingerprint.layer_map_path, self.fingerprint.pair)
            write_whole(path, text.encode())
        except OSError as error:
            raise Error(
                f"the profile cannot be kept in {path.parent} ({error}): free some space, or set "
                "SPMOE_CACHE to a folder that can be written"
            ) from error
        return path


def find_profile(fingerprint: Fingerprint) -> Profile | None:
    """Return the profile kept for this fingerprint, None if there is none.

    Raises:
        InvalidArgument: There is one, but it is stale, damaged or unreadable; the message says
            which.
    """
    try:
        path = fingerprint.path
        if not path.exists():
            return None
        # Opening a pipe would wait for somebody to write to it.
        kept = json.loads(path.read_text(encoding="utf-8") if path.is_file() else "null")
    except OSError as error:
        raise InvalidArgument(
            f"no profile can be read ({error}): set SPMOE_CACHE to a folder of this user"
        ) from error
    except (ValueError, RecursionError):
        kept = None
    damaged = f"{path} is not a profile of this version: run `spmoe profile` again"
    if not isinstance(kept, dict) or kept.get("format") != _FORMAT:
        raise InvalidArgument(damaged)
    try:
        machine = kept["fingerprint"]["machine"]
        for name, found in fingerprint.machine.items():
            if machine[name] != found:
                raise InvalidArgument(
                    f'the profile was measured with {name} "{machine[name]}", but here it is '
                    f'"{found}": run `spmoe profile` again'
                )
        return Profile(_costs(kept["costs"]), dict(kept["spread"]), fingerprint)
    except InvalidArgument:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InvalidArgument(damaged) from error


def _costs(kept: dict[str, Any]) -> Costs:
    """Return the costs that JSON holds.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: They are none, or are past
            what any machine takes.
    """
    values = kept | {
        name: {int(at): seconds for at, seconds in kept[name].items()}
        for name in ("layer_s", "copy_s")
    }
    costs = Costs(**values)
    singles = (costs.draft_s, costs.prefetch_s, costs.draft_token_s)
    times = [*singles, *costs.layer_s.values(), *costs.copy_s.values()]
    counts = [*costs.layer_s, *costs.copy_s]
    if not (
        all(time == 0 or _SHORTEST_S <= time <= _LONGEST_S for time in times)
        and all(1 <= count <= _MOST_ROWS for count in counts)
        and type(costs.expert_bytes) is int
        and costs.expert_bytes <= _MOST_BYTES
    ):
        raise ValueError(f"{costs} are no costs of any machine")
    return costs


def known_costs(fingerprint: Fingerprint, expert_bytes: int | None = None) -> Costs | None:
    """Return the costs kept for this fingerprint; None, with a warning if there are stale ones.

    Args:
        fingerprint: Of the pair.
        expert_bytes: What an expert takes, if known: costs of other experts are stale.
    """
    try:
        kept = find_profile(fingerprint)
        if kept is None:
            return None
        if expert_bytes not in (None, kept.costs.expert_bytes):
            raise InvalidArgument(
                f"the profile was measured with experts of {kept.costs.expert_bytes} bytes, but "
                f"here they take {expert_bytes}: run `spmoe profile` again"
            )
    except InvalidArgument as stale:
        log.warning("%s; estimating instead", stale)
        return None
    return kept.costs


def known_layer_map(
    fingerprint: Fingerprint, target: TargetModel | None = None, draft: Any = None
) -> LayerMap | None:
    """Return the map kept for this pair; None, with a warning if there is a stale one.

    A cache folder that cannot be read holds none; `known_costs` warns of it.

    Args:
        fingerprint: Of the pair.
        target: With ``draft``: a map that does not fit them is stale.
        draft: Of the pair.
    """
    try:
        path = fingerprint.layer_map_path
        if not path.exists():
            return None
    except OSError:
        return None
    try:
        kept = LayerMap.load(path, fingerprint.pair)
        reason = kept.mismatch(target, draft) if target is not None and draft is not None else None
        if reason is not None:
            raise InvalidArgument(
                f"the layer map {path} is stale: {reason}; run `spmoe profile` again"
            )
    except InvalidArgument as stale:
        log.warning("%s", stale)
        return None
    return kept


def _describe(model: str | PathLike[str]) -> Mapping[str, Any]:
    checkpoint = find_checkpoint(model)
    return {
        "config": json.loads((checkpoint.directory / "config.json").read_text(encoding="utf-8")),
        "files": {shard.name: shard.stat().st_size for shard in checkpoint.shards},
    }
