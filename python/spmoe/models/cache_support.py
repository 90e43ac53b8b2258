"""What the cache of a model can do: its own account, and a trial on a few tokens.

A family may keep its past in keys and values, in recurrent states, or in a cache class of its own;
and its passes of several tokens may or may not continue from these as its passes of one do. The
model is asked once, with routed experts that are not in memory left out: they do not touch the
cache.
"""

from __future__ import annotations

from typing import Literal
from weakref import WeakKeyDictionary

import torch

from spmoe.errors import DeviceError, InvalidArgument, OutOfMemory
from spmoe.models.cached import CachedCausalLM, CacheSupport, CausalLM
from spmoe.models.experts import without_contribution

_PROMPT = (5, 3, 8)
_TEXT = (2, 7, 1)  # what follows the prompt
_REJECTED = (9, 4)  # what is read in place of the last two, and must leave no trace

_ONE_BY_ONE = "a pass of several tokens does not continue the text as passes of one do"

# In the order of what they cost: rewind, several.
_WAYS: tuple[tuple[Literal["crop", "restore"], bool], ...] = (
    ("crop", True),
    ("restore", True),
    ("restore", False),
)

_SUPPORT: WeakKeyDictionary[CausalLM, CacheSupport] = WeakKeyDictionary()


def cached(model: CausalLM) -> CachedCausalLM:
    """Return a reader of a new sequence. Errors as of `cache_support`."""
    return CachedCausalLM(model, cache_support(model))


def cache_support(model: CausalLM) -> CacheSupport:
    """Return what the cache of ``model`` can do; asks the model itself on the first call.

    Raises:
        InvalidArgument: The model cannot read a token; the message has its own reason.
        OutOfMemory: It does not fit in memory.
    """
    known = _SUPPORT.get(model)
    if known is None:
        with without_contribution(model):
            known = _SUPPORT[model] = _try(model)
    return known


def why_not_draft(target: CausalLM, draft: CausalLM) -> str | None:
    """Return why ``draft`` cannot propose tokens for ``target``; None if it can.

    Raises:
        InvalidArgument: The target cannot read a token.
        OutOfMemory: One of them does not fit in memory.
    """
    support = cache_support(target)
    if support.reason:
        return f"rejected tokens cannot leave the target's cache ({support.reason})"
    try:
        support = cache_support(draft)
    except InvalidArgument as error:
        return str(error)
    if support.rewind == "restart":
        return f"rejected tokens cannot leave the draft's cache ({support.reason})"
    return None


def _try(model: CausalLM) -> CacheSupport:
    reasons = []
    for own_cache in (False, True):
        plain = CacheSupport(own_cache, "restart", several=False)
        try:
            expected = _one_by_one(CachedCausalLM(model, plain))
        except (OutOfMemory, DeviceError):
            raise
        except Exception as error:  # whatever the model's code raises
            reasons.append(error)
            continue
        return _try_rewinding(model, own_cache, expected)
    raise InvalidArgument(
        f"{type(model).__name__} ({model.config.model_type}) cannot read a token in this version "
        f"of transformers ({type(reasons[0]).__name__}: {reasons[0]}): use transformers for it, "
        "or another model"
    ) from reasons[0]


def _try_rewinding(model: CausalLM, own_cache: bool, expected: torch.Tensor) -> CacheSupport:
    reason = ""
    for rewind, several in _WAYS:
        support = CacheSupport(own_cache, rewind, several, "" if several else _ONE_BY_ONE)
        try:
            found = _rejecting(CachedCausalLM(model, support))
        except (OutOfMemory, DeviceError):
            raise
        except Exception as error:  # a cache that cannot be cropped raises one of several
            reason = f"{type(error).__name__}: {error}"
            continue
        if torch.allclose(found, expected, rtol=0, atol=_tolerance(expected)):
            return support
        reason = "its state cannot be put back"
    return CacheSupport(own_cache, "restart", several=False, reason=reason)


def _one_by_one(model: CachedCausalLM) -> torch.Tensor:
    """Return the logits behind each token of the text, [tokens, vocab], read as `generate` does."""
    model.read(_PROMPT)
    return torch.cat([model.read([token]) for token in _TEXT])


def _rejecting(model: CachedCausalLM) -> torch.Tensor:
    """Return the same logits, with tokens read and rewound on the way."""
    model.read(_PROMPT)
    first = model.read([_TEXT[0], *_REJECTED], last=3)[:1]
    if not model.can_rewind:
        raise ValueError("its cache says that it cannot be cropped")
    model.rewind(len(_PROMPT) + 1)
    text = [*_PROMPT, *_TEXT]
    return torch.cat([first, model.read(text[model.length :], last=2)])


def _tolerance(logits: torch.Tensor) -> float:
    """Return the difference that rounding may make between passes of one and of several tokens."""
    return max(1e-4, 16 * torch.finfo(logits.dtype).eps) * float(logits.abs().max())
