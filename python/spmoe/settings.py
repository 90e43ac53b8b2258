"""`Settings`: how a model is to run, checked as a whole before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch

from spmoe.arguments import whole_number
from spmoe.config import check_draft_length, check_link_gbps, check_memory
from spmoe.errors import InvalidArgument
from spmoe.policies import DEFAULT, Policy, Traits, eviction_of, traits_of
from spmoe.system.devices import native_name, resolve_device

MOST_SPANS = 1 << 24

_MOST_CONTEXT = 1 << 30  # tokens
_MOST_THREADS = 1024

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _SettingNames(TypedDict, total=False):
    expert_memory: int | str
    device: str
    pinned_memory: int | str
    policy: str | Policy
    eviction: str | None
    link_gbps: float
    trace_spans: int


class RuntimeSettingNames(_SettingNames, total=False):
    """Keywords of `Settings` that concern a `Runtime`."""

    compute_threads: int
    copy_threads: int


class LoadSettingNames(_SettingNames, total=False):
    """Keywords of `Settings` that `load` takes."""

    draft_length: int | str
    dtype: torch.dtype | str | None
    max_context: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is to run; reads no model.

    Attributes:
        expert_memory: Memory for experts: "auto", "25%" of all, "6GiB", or bytes.
        device: Of all that computes: "host", "cuda", "cuda:<index>", or "auto": CUDA where it can
            be used. Kept as "host" or "cuda:<index>".
        pinned_memory: Experts to hold in page-locked RAM, from which a CUDA device copies at full
            speed: an amount as for ``expert_memory``, 0 for none, or "auto": all that fit in RAM,
            none on the host. The others stay in the checkpoint's files.
        draft_length: Tokens drafted an iteration, from 0 to 31, or "auto": chosen each time.
        policy: What is prefetched: one of `POLICIES`, or a `spmoe.Policy`.
        eviction: What leaves for it: one of `EVICTIONS`, or "auto", the one that the policy's
            source uses. None is the one of least traffic for the policy: see
            `spmoe.policies.Traits` and bench/results/evictions-8x.md.
        dtype: Of the target's activations and of all its weights but the experts'; None means
            float32 on the host, the checkpoint's own on CUDA.
        max_context: Tokens of prompt and answer that memory is kept for; None: the model's own
            context, 4096 at most.
        link_gbps: Paces the link to so many 10^9 bytes a second, at least 1e-6; 0 means as fast as
            it goes.
        trace_spans: The latest spans of time to keep for `Runtime.spans`; 0 means none.
        compute_threads: Threads of the expert kernels, up to 1024; 0 means one a core.
        copy_threads: Threads that read from the store, 1 to 1024.

    Raises:
        InvalidArgument: A setting is none of its values; the message names them.
        DeviceError: The CUDA device cannot be used; the message says why.
    """

    expert_memory: int | str = "auto"
    device: str = "auto"
    pinned_memory: int | str = "auto"
    draft_length: int | str = "auto"
    policy: str | Policy = DEFAULT
    eviction: str | None = "auto"
    dtype: torch.dtype | str | None = None
    max_context: int | None = None
    link_gbps: float = 0.0
    trace_spans: int = 0
    compute_threads: int = 0
    copy_threads: int = 2

    def __post_init__(self) -> None:
        check_memory(self.expert_memory)
        check_memory(self.pinned_memory, setting="pinned_memory", least=0)
        check_draft_length(self.draft_length)
        eviction_of(self.traits, self.eviction)
        check_link_gbps(self.link_gbps)
        whole_number("trace_spans", self.trace_spans, 0, MOST_SPANS)
        whole_number("compute_threads", self.compute_threads, 0, _MOST_THREADS)
        whole_number("copy_threads", self.copy_threads, 1, _MOST_THREADS)
        if self.max_context is not None:
            whole_number("max_context", self.max_context, 1, _MOST_CONTEXT)
        check_dtype(self.dtype)
        # By the name that was found, so that a copy of these settings looks for nothing again.
        object.__setattr__(self, "device", native_name(resolve_device(self.device)))

    @property
    def traits(self) -> Traits:
        """The policy, as it describes itself."""
        return traits_of(self.policy)

    @property
    def place(self) -> torch.device:
        """The device, as torch has it."""
        return resolve_device(self.device)


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the torch dtype that a setting means; None leaves the choice to the device.

    Raises:
        InvalidArgument: It is not float32, bfloat16 or float16.
    """
    if dtype is None:
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES:
        raise InvalidArgument(f'dtype "{dtype}" is not float32, bfloat16 or float16')
    return resolved
