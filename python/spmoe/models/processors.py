"""The logits processors that a model's own ``generation_config.json`` asks for.

``model.generate`` applies them to greedy decoding too (a repetition penalty, forbidden words, a
least length, ...). They are functions of the text so far and of one row of logits, so a
verification applies them row by row and writes what ``generate`` writes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from spmoe.errors import InvalidArgument

# Scores of the token after a text: text, logits [vocab] -> [vocab].
Process = Callable[[Sequence[int], torch.Tensor], torch.Tensor]

# Settings that change a text in another way than by processors -> the value that does not.
_NOT_APPLIED: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "guidance_scale": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "stop_strings": None,
    "max_time": None,
    "token_healing": False,
    "watermarking_config": None,
    "cache_implementation": None,
    "prefill_chunk_size": None,
}


def set_aside(model: PreTrainedModel) -> list[str]:
    """Reset what spmoe does not apply of the model's generation configuration.

    Reset in the model itself: ``generate`` takes from there what its arguments leave at None.

    Returns:
        "name=value" of each setting.
    """
    config = model.generation_config
    found: list[str] = []
    for name, neutral in _NOT_APPLIED.items():
        value = getattr(config, name, None)
        if value not in (None, False, neutral):
            found.append(f"{name}={value}")
            setattr(config, name, neutral)
    return found


def request_processors(
    model: PreTrainedModel, prompt: Sequence[int], max_length: int
) -> Process | None:
    """Return what ``generate`` does to the logits of one request; None if it does nothing.

    Args:
        model: The target, after `set_aside`.
        prompt: Token ids, at least one.
        max_length: Tokens of prompt and answer together, at most; more than the prompt's.

    Raises:
        InvalidArgument: The generation configuration contradicts itself.
    """
    config: Any = copy.deepcopy(model.generation_config)
    generate: Any = model.generate  # transformers' own types do not cover it
    config.update(do_sample=False, max_new_tokens=max_length - len(prompt))
    found: Any = LogitsProcessorList()

    def keep(_model: Any, ids: torch.Tensor, logits_processor: Any, **_: Any) -> torch.Tensor:
        found.extend(logits_processor)
        return ids

    ids = torch.tensor([list(prompt)], device=model.device)
    try:
        # `generate` prepares everything and hands it to `keep` in place of its decoding loop.
        generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            custom_generate=keep,
        )
    except (ValueError, TypeError) as error:
        raise InvalidArgument(
            f"generation_config.json of the target cannot be used ({error}): correct the setting"
        ) from error
    if not found:
        return None

    def process(text: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor([list(text)], device=logits.device)
        scores: torch.Tensor = found(ids, logits[None].float())
        return scores[0]

    return process
