"""The abilities of a model's cache: its own account, and a trial on a few tokens.

A family may keep its past in keys and values, in recurrent states, or in a cache class of its own;
and its passes of several tokens may or may not continue from these as its passes of one do. The
model is asked once, with routed experts that are not in memory left out: they do not touch the
cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig

from spmoe.errors import InvalidArgument, OutOfMemory
from spmoe.models.cached import CachedCausalLM, CacheSupport, CausalLM
from spmoe.models.experts import without_contribution
from spmoe.system.out_of_memory import is_out_of_memory

_PROMPT = (5, 3, 8)
_NEW_TOKENS = 4  # that the trial writes; all but the last are read

_ONE_BY_ONE = "a pass of several tokens does not continue the text as passes of one do"

# In the order of what they cost: rewind, several.
_WAYS: tuple[tuple[Literal["crop", "restore"], bool], ...] = (
    ("crop", True),
    ("restore", True),
    ("restore", False),
)

_SUPPORT: WeakKeyDictionary[CausalLM, CacheSupport] = WeakKeyDictionary()
_one_trial = threading.Lock()  # it changes the model while it lasts


def cached(model: CausalLM) -> CachedCausalLM:
    """Return a reader of a new sequence. Errors as of `cache_support`."""
    return CachedCausalLM(model, cache_support(model))


def cache_support(model: CausalLM) -> CacheSupport:
    """Return what the cache of ``model`` can do; asks the model itself on the first call.

    Raises:
        InvalidArgument: The model cannot write a token, or its passes do not give what its own
            ``generate`` gives; the message has the reason.
        OutOfMemory: It does not fit in memory.
    """
    with _one_trial:
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
    try:
        tokens, expected = _generate(model)
    except Exception as error:  # whatever the model's code raises
        if is_out_of_memory(error):
            raise OutOfMemory(f"{type(model).__name__} cannot read a token: {error}") from error
        raise InvalidArgument(
            f"{type(model).__name__} ({model.config.model_type}) cannot write a token in this "
            f"version of transformers ({type(error).__name__}: {error}): use another model"
        ) from error
    reason = ""
    for own_cache in (False, True):
        plain = CacheSupport(own_cache, "restart", several=False)
        reason = _fault(partial(_one_by_one, tokens), model, plain, expected)
        if not reason:
            return _try_rewinding(model, own_cache, tokens, expected)
    raise InvalidArgument(
        f"passes of {type(model).__name__} ({model.config.model_type}) do not give what its own "
        f"generate gives ({reason}), so its text could not be kept: use transformers for it"
    )


def _try_rewinding(
    model: CausalLM, own_cache: bool, tokens: Sequence[int], expected: torch.Tensor
) -> CacheSupport:
    reason = ""
    for rewind, several in _WAYS:
        support = CacheSupport(own_cache, rewind, several, "" if several else _ONE_BY_ONE)
        reason = _fault(partial(_rejecting, tokens), model, support, expected)
        if not reason:
            return support
    return CacheSupport(own_cache, "restart", several=False, reason=reason)


def _fault(
    read: Callable[[CachedCausalLM], torch.Tensor],
    model: CausalLM,
    support: CacheSupport,
    expected: torch.Tensor,
) -> str:
    """Return why ``read`` does not give the logits expected; empty if it does."""
    try:
        found = read(CachedCausalLM(model, support))
    except OutOfMemory:
        raise
    except Exception as error:  # a cache that cannot do what is asked raises one of several
        return f"{type(error).__name__}: {error}"
    # `generate` reports float32, whatever the model computes in.
    tolerance = _tolerance(expected, model.dtype)
    near = torch.allclose(found.float(), expected.float(), rtol=0, atol=tolerance)
    return "" if near else "its logits differ"


def _generate(model: CausalLM) -> tuple[list[int], torch.Tensor]:
    """Return the tokens that ``generate`` writes, and its logits behind all but the last."""
    ids = torch.tensor([_PROMPT], device=model.device)
    settings: Any = GenerationConfig
    config = settings(
        do_sample=False,
        max_new_tokens=_NEW_TOKENS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    own, model.generation_config = model.generation_config, config  # which may end texts early
    try:
        generate: Any = model.generate  # transformers' own types do not cover it
        output = generate(ids, attention_mask=torch.ones_like(ids))
    finally:
        model.generation_config = own
    tokens: list[int] = output.sequences[0, len(_PROMPT) :].tolist()
    return tokens, torch.cat(output.logits[1:])


def _one_by_one(tokens: Sequence[int], model: CachedCausalLM) -> torch.Tensor:
    """Read as `generate` does; return the logits behind all but the last, [tokens - 1, vocab]."""
    model.read(_PROMPT)
    return torch.cat([model.read([token]) for token in tokens[:-1]])


def _rejecting(tokens: Sequence[int], model: CachedCausalLM) -> torch.Tensor:
    """Return the same logits, with tokens read and rewound between."""
    first, *rest = tokens[:-1]
    rejected = [(token + 1) % model.vocabulary_size for token in rest]
    model.read(_PROMPT)
    logits = model.read([first, *rejected], last=1 + len(rest))[:1]
    if not model.can_rewind:
        raise ValueError("its cache says that it cannot be cropped")
    model.rewind(len(_PROMPT) + 1)
    text = [*_PROMPT, first, *rest]
    return torch.cat([logits, model.read(text[model.length :], last=len(rest))])


def _tolerance(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the difference that rounding may make between passes of one and of several tokens."""
    return max(1e-4, 16 * torch.finfo(dtype).eps) * float(logits.abs().max())
