"""The text that transformers itself writes, which every other text is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


def generate_alone(
    model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """Decode greedily by ``model.generate``, as the model's own generation configuration says.

    Args:
        model: A whole model, from `load_plain`.
        prompt: Token ids, at least one.
        max_new_tokens: At most; an end-of-text token ends a text sooner, itself included.

    Returns:
        The new token ids, and the scores [tokens, vocab] whose argmax each is.
    """
    ids = torch.tensor([list(prompt)], device=model.device)
    generate: Any = model.generate  # transformers' own types do not cover it
    output = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        output_scores=True,
    )
    return output.sequences[0, ids.shape[1] :].tolist(), torch.cat(output.scores)
