"""What the tests of runs share: tiny models of four families, and tables for each kind of task."""

import csv
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

GOOD, BAD = ("good", "great", "fine"), ("bad", "dull", "poor")
WORDS = (*GOOD, *BAD, "a", "film", "is", "it", "one", "play", "so", "song", "the", "this", "was")
SIZE = {"vocab_size": 32, "max_position_embeddings": 40, "initializer_range": 0.2}
BERT = SIZE | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
BERT |= {"intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT | {"pad_token_id": 0},
    "distilbert": SIZE | {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64},
    "llama": BERT | {"num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 3},
}


def write_tokenizer(folder: Path, pairs: bool = True) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokens = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * pairs
    PreTrainedTokenizerFast(
        **{"tokenizer_object": tokenizer, "model_max_length": 32, "model_input_names": inputs},
        **{"eos_token": "[SEP]"} | tokens,
    ).save_pretrained(folder)


def write_model(folder: Path, family: str = "bert") -> str:
    """A base model without a head, as it comes from the hub."""
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM if family == "llama" else AutoModel
    options = {"add_pooling_layer": False} if family == "roberta" else {}
    model = auto.from_config(AutoConfig.for_model(family, **FAMILIES[family]), **options)
    model.save_pretrained(folder)
    write_tokenizer(folder, pairs=family == "bert")
    return str(folder)


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def write_table(file: Path, kind: str = "classes", rows: int = 24) -> str:
    """Rows whose label a word tells."""
    generator = torch.Generator().manual_seed(0)
    table: list[dict[str, Any]] = []
    for i in range(rows):
        word, label = (GOOD, BAD)[i % 2][i % 3], ("good", "bad")[i % 2]
        noise = " ".join(WORDS[int(j)] for j in torch.randint(6, 17, (i % 4,), generator=generator))
        text, second = f"the film is {word} {noise}".strip(), (GOOD, BAD)[i % 4 // 2][i % 3]
        columns = {
            "classes": {"text": text, "label": label},
            "numbers": {"text": text, "label": (1.5, -0.25)[i % 2] + i / 100},
            "pairs": {"sentence1": text, "sentence2": f"it was {second}", "label": label},
            "causal": {"prompt": text, "completion": f"so it was {word}"},
            "several": {"text": text, "labels": [label, "film"] if i % 2 else [label]},
            "tags": {"tokens": text.split(), "tags": [w in BAD for w in text.split()]},
            "chat": {"messages": [turn("user", text), turn("assistant", f"so it was {word}")]},
        }
        table.append(columns[kind])
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, table)))
    else:
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows([table[0], *(row.values() for row in table)])
    return str(file)
