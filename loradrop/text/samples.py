"""A few batches to compare a model with itself on."""

from typing import Any

import torch

SENTENCES = (
    "The train to the coast leaves at seven, and it is rarely late.",
    "She had read the letter twice before she understood what it said.",
    "I would not recommend this film to anyone.",
)


def batches_for(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Some text for the model, or arbitrary tokens without a tokenizer.

    Raises ValueError for a model that does not take text.
    """
    wanted = model.main_input_name
    if wanted != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes {wanted}, and this command has text alone: in Python, "
            "call loradrop.verify with batches of your own"
        )
    if tokenizer is not None:
        batches = [dict(tokenizer(sentence, return_tensors="pt")) for sentence in SENTENCES]
    else:
        size = model.config.get_text_config().vocab_size
        ids = torch.arange(1, 49).reshape(3, 1, 16) * 7919 % size
        batches = [{"input_ids": row} for row in ids]
    if model.config.is_encoder_decoder and "Classification" not in type(model).__name__:
        batches = [{**batch, "decoder_input_ids": batch["input_ids"][:, :8]} for batch in batches]
    return batches
