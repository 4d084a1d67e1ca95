"""Tiny random models with a tokenizer, and made-up rows: to see a script run within seconds.

Nothing is learned from them that means anything, and nothing is downloaded.
"""

import json
import random
from pathlib import Path
from typing import Any

GOOD, BAD = ("good", "funny", "moving", "clever"), ("bad", "dull", "slow", "silly")
THINGS = ("film", "plot", "actor", "scene", "ending", "music")
WORDS = (*GOOD, *BAD, *THINGS, "a", "the", "with", "and", "is", "what", "like", ":", ".")


def tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(("[PAD]", "[EOS]", "[UNK]", *WORDS))}
    words = Tokenizer(WordLevel(known, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def encoder(folder: Path, layers: int = 4, width: int = 32) -> Path:
    """Writes a RoBERTa of that size into `folder`, which it returns."""
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    words = tokenizer()
    config = RobertaConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=130, pad_token_id=0, num_labels=2,
    )  # fmt: skip
    return _written(RobertaForSequenceClassification(config), words, folder)


def decoder(folder: Path, layers: int = 4, width: int = 32) -> Path:
    """Writes a Llama of that size into `folder`, which it returns."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=3 * width, max_position_embeddings=256,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return _written(LlamaForCausalLM(config), words, folder)


def _written(model: Any, words: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def reviews(file: Path, rows: int = 80, sentences: int = 2) -> Path:
    """Writes a CSV file with the columns text and label, which it returns."""
    draw, lines = random.Random(0), ["text,label"]
    for i in range(rows):
        words = (GOOD, BAD)[i % 2]
        count = draw.randint(1, sentences)
        said = [f"the {draw.choice(THINGS)} is {draw.choice(words)} ." for _ in range(count)]
        lines.append(f"{' '.join(said)},{i % 2}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines))
    return file


def answers(file: Path, rows: int = 48, sentences: int = 1) -> Path:
    """Writes a JSONL file with prompts and completions, which it returns."""
    draw, lines = random.Random(0), []
    for _ in range(rows):
        thing = draw.choice(THINGS)
        said = [f"the {thing} is {draw.choice(GOOD + BAD)} ." for _ in range(sentences)]
        row = {"prompt": f"what is the {thing} like :", "completion": " " + " ".join(said)}
        lines.append(json.dumps(row))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines))
    return file
