"""Conversations as tokens, by the tokenizer's chat template."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from loradrop.text.examples import ASKED, Example

_log = logging.getLogger(__name__)


def tokenized(rows: Sequence[Example], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each conversation, and which of them are learned: the assistant's turns, but
    none of a prompt's.

    Raises ValueError for a tokenizer without a template, and for a row that its template refuses.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "these rows are conversations, and the tokenizer has no chat template: choose a model "
            "that was made for chats (-Instruct, -Chat), or give prompt and completion columns"
        )
    from jinja2 import TemplateError

    marked = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()) is not None

    def render(messages: Sequence[Any], **options: Any) -> Any:
        given = {"tokenize": True, "return_dict": True, **options}
        return tokenizer.apply_chat_template(list(messages), **given)

    whole, turns, lost = [], 0, 0
    for row in rows:
        messages = [{k: v for k, v in m.items() if k != ASKED} for m in cast(Any, row.text)]
        asked = max((i + 1 for i, m in enumerate(cast(Any, row.text)) if m.get(ASKED)), default=0)
        try:
            made = render(messages, return_assistant_tokens_mask=marked)
            ids = list(made["input_ids"])
            if marked:
                learned = list(made["assistant_masks"])
            else:
                learned, missed = _assistant_mask(messages, ids, render, asked)
                turns += sum(m["role"] == "assistant" for m in messages[asked:])
                lost += missed
            if asked:
                before = render(messages[:asked], add_generation_prompt=True)["input_ids"]
                start = _common(ids, before)
                learned[:start] = [False] * start
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"the tokenizer's chat template refuses {row.text!r:.200} ({error}): repair the row"
            ) from error
        whole.append((ids, learned))
    if lost:
        what = "%d of %d turns of the assistant are not found in what the chat template makes of "
        _log.warning(what + "the whole conversation: they are not learned", lost, turns)
    return whole


def _assistant_mask(
    messages: Any, ids: list[int], render: Callable[..., Any], asked: int = 0
) -> tuple[list[bool], int]:
    """Which tokens an assistant's turn adds to the turns before it and the prompt for it, from
    message number `asked` on, and how many turns are not found.
    """
    learned, lost = [False] * len(ids), 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i >= asked:
            before = render(messages[:i], add_generation_prompt=True)["input_ids"] if i else []
            through = render(messages[: i + 1])["input_ids"]
            start, end = _common(ids, before), _common(ids, through)
            if end <= start:  # a template that writes a turn otherwise once others follow it
                start, end = _content(messages, i, ids, through, render)
            learned[start:end] = [True] * (end - start)
            lost += end <= start
    return learned, lost


def _content(
    messages: Any, i: int, ids: list[int], through: Sequence[int], render: Callable[..., Any]
) -> tuple[int, int]:
    """Where the content of a turn stands, with what closes it: it is what differs once it says
    something else, and closed as at the end of a conversation. (0, 0) where nothing differs.
    """
    other = [*messages[:i], {**messages[i], "content": "§"}, *messages[i + 1 :]]
    changed, alone = render(other)["input_ids"], render(other[: i + 1])["input_ids"]
    start, after = _common(ids, changed), _common(ids[::-1], changed[::-1])
    end = len(ids) - after
    if end <= start:
        return 0, 0
    closing = _common(through[::-1], alone[::-1])
    return start, end + _common(ids[end:], through[len(through) - closing :])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
