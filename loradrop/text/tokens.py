"""Rows as tokens, batches and metrics: what training needs of a task and its tokenizer."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from loradrop.text.examples import KINDS, Example, TextTask

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase

IGNORED = -100  # the label that losses leave out


class TokenizedDataset(Dataset[dict[str, Any]]):
    """Rows of token ids, unpadded lists: input_ids, attention_mask, [token_type_ids,] labels."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


def _encode(rows: Sequence[Example], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    pairs = [row.pair for row in rows] if rows and rows[0].pair is not None else None
    tokens = tokenizer([row.text for row in rows], pairs, truncation=True, max_length=max_length)
    columns = {**tokens, "labels": [row.label for row in rows]}
    return [{key: column[i] for key, column in columns.items()} for i in range(len(rows))]


def _prompt(row: Example) -> str:
    joined = row.pair is None or row.text[-1:].isspace() or row.pair[:1].isspace()
    return row.text if joined else row.text + "\n"


def _encode_causal(
    rows: Sequence[Example], tokenizer: Any, max_length: int
) -> list[dict[str, Any]]:
    """Prompt, completion and end token, cut at `max_length`; only the latter two are learned."""
    prompts = tokenizer([_prompt(row) for row in rows], verbose=False)["input_ids"]
    pairs = [row.pair or "" for row in rows]
    completions = tokenizer(pairs, add_special_tokens=False, verbose=False)["input_ids"]
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded, too_long = [], []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        if prompt and prompt[-1] in closing:
            prompt = prompt[:-1]
        ids = [*prompt, *completion, *end][:max_length]
        unlearned = 0 if row.pair is None else min(len(prompt), max_length)
        labels = [IGNORED] * unlearned + ids[unlearned:]
        if all(label == IGNORED for label in labels[1:]):
            too_long.append(len(prompt))
        encoded.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    if too_long:
        raise ValueError(
            f"{len(too_long)} of {len(rows)} rows have nothing to learn from within data.max_length"
            f"={max_length} (the longest of their prompts has {max(too_long)} tokens): raise it or "
            "leave these rows out"
        )
    return encoded


def tokenize(
    task: TextTask, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """(train, dev) as tokens. Where neither side of a prompt and its completion has a space at the
    seam, a line break joins them.

    Raises ValueError for a `max_length` beyond the tokenizer's own, and for rows of causal_lm
    whose prompt leaves no token of the completion.
    """
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"data.max_length={max_length} is more than the {tokenizer.model_max_length} tokens "
            "that this model takes: lower it"
        )
    encode = _encode_causal if task.kind == "causal_lm" else _encode
    train, dev = (encode(r, tokenizer, max_length) if r else [] for r in (task.train, task.dev))
    return TokenizedDataset(train), TokenizedDataset(dev)


def collator(
    task_or_kind: TextTask | str, tokenizer: "PreTrainedTokenizerBase"
) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
    """Pads a list of rows to its longest and makes tensors of it; labels of causal_lm with -100.

    A causal model without a pad token gets its end token, in a copy of the tokenizer. Raises
    ValueError where there is no token to pad with.
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    kind = task_or_kind if isinstance(task_or_kind, str) else task_or_kind.kind
    if kind not in KINDS:
        raise ValueError(f"there is no task {kind!r}: choose {', '.join(KINDS)}")
    causal = kind == "causal_lm"
    if tokenizer.pad_token is None and causal and tokenizer.eos_token is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            "the tokenizer has no pad token: set tokenizer.pad_token (often to its eos_token), and "
            "model.config.pad_token_id with it"
        )
    if causal:
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return DataCollatorWithPadding(tokenizer)


def _correlation(a: Any, b: Any) -> float:
    """Pearson's of two columns; of two one-hot matrices it is Matthews', by Gorodkin (2004)."""
    a, b = a - a.mean(0), b - b.mean(0)
    size = ((a * a).sum() * (b * b).sum()) ** 0.5
    return float((a * b).sum() / size) if size > 0 else 0.0


def _score(metric: str, prediction: "EvalPrediction") -> dict[str, float]:
    output = prediction.predictions
    scores = np.asarray(output[0] if isinstance(output, tuple) else output, dtype=np.float64)
    truth = np.asarray(prediction.label_ids).reshape(-1)
    if metric == "pearson":
        return {metric: _correlation(scores.reshape(-1), truth)}
    guess = scores.argmax(-1).reshape(-1)
    if metric == "accuracy":
        return {metric: float((guess == truth).mean())}
    classes = np.eye(scores.shape[-1])
    return {metric: _correlation(classes[guess], classes[truth])}


def metric_fn(task: TextTask) -> "Callable[[EvalPrediction], dict[str, float]] | None":
    """Logits and labels -> {task.metric: value}, 0 where a correlation is undefined; None for loss.

    Matthews' correlation is Gorodkin's (2004) for any number of classes, the usual one for two.
    """
    return None if task.kind == "causal_lm" else partial(_score, task.metric)
