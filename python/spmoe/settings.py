"""The settings of `load`, checked all together before a model is read."""

from __future__ import annotations

import torch

from spmoe.config import (
    check_count,
    check_draft_length,
    check_link_gbps,
    check_memory,
    check_pinned_memory,
)
from spmoe.devices import resolve_device
from spmoe.errors import InvalidArgument
from spmoe.policies import Policy, eviction_of, traits_of
from spmoe.runtime import MOST_SPANS

_MAX_CONTEXT = 1 << 30  # tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_settings(
    *,
    expert_memory: int | str,
    pinned_memory: int | str,
    draft_length: int | str,
    policy: str | Policy,
    eviction: str,
    device: str,
    dtype: torch.dtype | str | None,
    link_gbps: float,
    trace_spans: int,
    max_context: int | None,
) -> torch.device:
    """Check every setting of `load` and return the device; reads no model.

    Arguments as for `load`.

    Raises:
        InvalidArgument: A setting is none of its values; the message names them.
        DeviceError: The CUDA device cannot be used; the message says why.
    """
    check_memory(expert_memory)
    check_pinned_memory(pinned_memory)
    check_draft_length(draft_length)
    eviction_of(traits_of(policy), eviction)
    check_link_gbps(link_gbps)
    check_count("trace_spans", trace_spans, least=0, most=MOST_SPANS)
    if max_context is not None:
        check_count("max_context", max_context, least=1, most=_MAX_CONTEXT)
    check_dtype(dtype)
    return resolve_device(device)


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
