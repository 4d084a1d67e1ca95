"""Rows as tokens and batches: what training needs of a task and its tokenizer."""

import copy
import itertools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor, nn
from torch.utils.data import Dataset

from loradrop.text import chats
from loradrop.text.examples import KINDS, Example, TextTask
from loradrop.text.labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
Row = TypeVar("Row")


class TokenizedDataset(Dataset[dict[str, Any]]):
    """Rows of token ids, unpadded lists: input_ids, attention_mask, [token_type_ids,] labels.

    max_length   in tokens, at which longer rows were cut; None where that is not known
    """

    def __init__(self, rows: Sequence[dict[str, Any]], max_length: int | None = None) -> None:
        self.rows, self.max_length = rows, max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


def _encode(
    task: TextTask, rows: Sequence[Example], tokenizer: Any, limit: int
) -> list[dict[str, Any]]:
    """Texts or pairs with the class, the number, or a float for each class (multi-label)."""
    pairs = [row.pair for row in rows] if rows[0].pair is not None else None
    tokens = _cut([row.text for row in rows], pairs, tokenizer, limit)
    if empty := [row.text for row, ids in zip(rows, tokens["input_ids"], strict=True) if not ids]:
        raise ValueError(
            f"{len(empty)} of {len(rows)} texts have no token (the first is {empty[0]!r:.100}): "
            "fill them or leave them out"
        )
    labels: list[Any] = [row.label for row in rows]
    if task.kind == "multi_label_classification":
        labels = [[float(i in label) for i in range(len(task.labels))] for label in labels]
    columns = {**tokens, "labels": labels}
    return [{key: column[i] for key, column in columns.items()} for i in range(len(rows))]


def _cut(texts: Any, pairs: Any, tokenizer: Any, limit: int, **options: Any) -> Any:
    """The tokens of texts and pairs, cut at `limit` where some are longer."""
    tokens = tokenizer(texts, pairs, verbose=False, **options)
    if (longest := max(map(len, tokens["input_ids"]))) > limit:
        _warn_cut(sum(len(ids) > limit for ids in tokens["input_ids"]), len(texts), longest, limit)
        tokens = tokenizer(texts, pairs, truncation=True, max_length=limit, **options)
    return tokens


def _warn_cut(cut: int, rows: int, longest: int, limit: int) -> None:
    if cut:
        why = "%d of %d rows are cut at %d tokens (the longest has %d)"
        _log.warning(why, cut, rows, limit, longest)


def _encode_words(
    task: TextTask, rows: Sequence[Example], tokenizer: Any, limit: int
) -> list[dict[str, Any]]:
    """Words, with the label of each at the first of its tokens, of the rows where one counts."""
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ValueError(f"token_classification needs a fast tokenizer, which {kind} is not")
    texts = [list(row.text) for row in rows]
    tokens = _cut(texts, None, tokenizer, limit, is_split_into_words=True)
    encoded = []
    for i, row in enumerate(rows):
        words, tags = tokens.word_ids(i), cast(tuple[int, ...], row.label)
        pieces = zip([None, *words], words, strict=False)
        labels = [tags[w] if w is not None and w != last else IGNORED for last, w in pieces]
        encoded.append({key: column[i] for key, column in tokens.items()} | {"labels": labels})
    return _that_teach(encoded, [row["labels"] for row in encoded])


def _that_teach(rows: Sequence[Row], labels: Sequence[Sequence[int]]) -> list[Row]:
    """The rows that have a label which counts. Raises ValueError where there is none."""
    kept = [row for row, own in zip(rows, labels, strict=True) if {*own} - {IGNORED}]
    if not kept:
        raise ValueError("no row has a token to learn: look at the columns of the data")
    if len(kept) < len(rows):
        what = "%d of %d rows have no token to learn, as blank ones: they are left out"
        _log.warning(what, len(rows) - len(kept), len(rows))
    return kept


def _prompt(row: Example) -> str:
    text = cast(str, row.text)
    joined = row.pair is None or text[-1:].isspace() or row.pair[:1].isspace()
    return text if joined else text + "\n"


def _encode_causal(
    task: TextTask, rows: Sequence[Example], tokenizer: Any, limit: int
) -> list[dict[str, Any]]:
    """Prompt, completion and end token, cut at `limit`; only the latter two are learned."""
    texts = [_prompt(row) for row in rows]
    prompts = tokenizer(texts, verbose=False)["input_ids"]
    pairs = [row.pair or "" for row in rows]
    completions = tokenizer(pairs, add_special_tokens=False, verbose=False)["input_ids"]
    bare = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    whole = []
    for row, prompt, own, completion in zip(rows, prompts, bare, completions, strict=True):
        if prompt and prompt[-1] in closing and (not own or prompt[-len(own) :] != own):
            prompt = prompt[:-1]  # the tokenizer's, and not the user's
        ended = (prompt if row.pair is None else completion)[-1:] == end
        ids = [*prompt, *completion, *([] if ended else end)]
        unlearned = 0 if row.pair is None else len(prompt)
        whole.append((ids, [IGNORED] * unlearned + ids[unlearned:]))
    return _cut_causal(whole, limit)


def _cut_causal(rows: Sequence[tuple[list[int], list[int]]], limit: int) -> list[dict[str, Any]]:
    """(ids, labels) as rows of at most `limit`, without those that say nothing, as blank ones.

    Raises ValueError where the limit leaves no label in a row, or no row says anything.
    """
    rows = _that_teach(rows, [v[1:] for _, v in rows])
    learned = [next(i for i, v in enumerate(v) if i and v != IGNORED) for _, v in rows]
    if too_long := [at for at in learned if at >= limit]:
        raise ValueError(
            f"{len(too_long)} of {len(rows)} rows have nothing to learn from within data.max_length"
            f"={limit} (the longest of their prompts has {max(too_long)} tokens): raise it or "
            "leave these rows out"
        )
    lengths = [len(ids) for ids, _ in rows]
    _warn_cut(sum(length > limit for length in lengths), len(rows), max(lengths), limit)
    return [
        {"input_ids": ids[:limit], "attention_mask": [1] * len(ids[:limit]), "labels": v[:limit]}
        for ids, v in rows
    ]


def _encode_chat(
    task: TextTask, rows: Sequence[Example], tokenizer: Any, limit: int
) -> list[dict[str, Any]]:
    """Conversations by the tokenizer's template; the assistant's turns are learned."""
    found = [(ids, _labels(ids, learned)) for ids, learned in chats.tokenized(rows, tokenizer)]
    return _cut_causal(found, limit)


def _labels(ids: Sequence[int], learned: Sequence[bool]) -> list[int]:
    return [token if own else IGNORED for token, own in zip(ids, learned, strict=True)]


def _positions(model: Any) -> float:
    """The tokens that the model's tables of absolute positions take; inf where it has none."""
    limit, known = float("inf"), _trained_positions(model)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1  # as RoBERTa's
            limit = min(limit, min(module.num_embeddings, known) - reserved)
        rotations = getattr(module, "embed_positions", None)  # of GPT-J
        if isinstance(rotations, Tensor):
            limit = min(limit, len(rotations))
    return limit


def _trained_positions(model: Any) -> float:
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return float("inf") if known is None or known <= 0 else known  # -1 is XLNet's: no limit


def _check_vocabulary(rows: Sequence[Mapping[str, Any]], tokenizer: Any, model: Any) -> None:
    """Raises ValueError for a token that the model has no embedding for."""
    size = len(model.get_input_embeddings().weight)
    padding = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
    largest = max(itertools.chain(padding, *(row["input_ids"] for row in rows)), default=0)
    if largest >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"the tokenizer gives {token!r} the id {largest}, and the model has only {size} "
            "embeddings: use the tokenizer that belongs to this model, or save the model after "
            f"model.resize_token_embeddings({len(tokenizer)})"
        )


def tokenize(
    task: TextTask,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None = None,
    model: "PreTrainedModel | None" = None,
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """(train, dev) as tokens. Where neither side of a prompt and its completion has a space at the
    seam, a line break joins them.

    max_length   None: the longest row, but no more than the tokenizer and the model take
    model        checked for its positions and its vocabulary

    Raises ValueError for a `max_length` beyond what tokenizer and model take, for rows of causal_lm
    whose prompt leaves no token of the completion, and for tokens that the model does not have.
    """
    limit: float = tokenizer.model_max_length
    if model is not None:
        limit = min(limit, _positions(model))
    if max_length is not None and max_length > limit:
        raise ValueError(
            f"data.max_length={max_length} is more than the {limit} tokens that this model takes: "
            "lower it"
        )
    trained = float("inf") if model is None else _trained_positions(model)
    if max_length is not None and max_length > trained:
        why = "data.max_length=%d is beyond the %d positions that the model was made for"
        _log.warning(why, max_length, trained)
    limit = max_length or min(limit, trained)
    kinds = {"causal_lm": _encode_causal, "token_classification": _encode_words}
    first = next(iter(task.train or task.dev), None)
    chat = task.kind == "causal_lm" and first is not None and isinstance(first.text, tuple)
    encode = _encode_chat if chat else kinds.get(task.kind, _encode)
    at = int(min(limit, sys.maxsize))
    train, dev = (encode(task, r, tokenizer, at) if r else [] for r in (task.train, task.dev))
    if model is not None:
        _check_vocabulary([*train, *dev], tokenizer, model)
    return TokenizedDataset(train, at), TokenizedDataset(dev, at)


def collator(
    task_or_kind: TextTask | str, tokenizer: "PreTrainedTokenizerBase"
) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
    """Pads a list of rows to its longest and makes tensors of it; labels of tokens with -100.

    A causal model without a pad token gets its end token, in a copy of the tokenizer. Raises
    ValueError where there is no token to pad with.
    """
    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
    )

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
    if kind == "token_classification":
        return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)
    return DataCollatorWithPadding(tokenizer)
