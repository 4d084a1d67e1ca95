"""What the columns of a table are: from cells to examples."""

import ast
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, product
from typing import Any, NamedTuple

from loradrop.text.examples import ASKED, Example
from loradrop.text.labels import IGNORED, read_labels
from loradrop.text.tables import Table

# The columns where the configuration names none, in any case of their letters: the first label
# column, and the first (text, pair) that the table has. LABELS go before the pairs of PROMPTS, and
# those before MORE_LABELS.
LABELS = ("label", "labels", "ner_tags")
MORE_LABELS = ("sentiment", "category", "class", "target", "tags", "pos_tags")
TAGS = ("ner_tags", "tags", "pos_tags")  # of words, where they are lists
TEXTS = (
    *(("text", None), ("sentence1", "sentence2"), ("premise", "hypothesis")),
    *(("question1", "question2"), ("question", "sentence"), ("sentence", None), ("review", None)),
    *(("tweet", None), ("comment", None), ("content", None), ("tokens", None), ("words", None)),
)
CHATS = ("messages", "conversations")
_ASKED = ("prompt", "instruction", "question", "query", "input")
PAIRS = tuple(product(_ASKED, ("completion", "output", "response", "answer")))
PROMPTS = (*((chat, None) for chat in CHATS), *PAIRS, ("text", None), ("sentence", None))
CONTEXTS = ("input", "context")  # goes below what is asked, where it is not empty
ASIDE = ("", "unnamed: 0", "id", "idx", "index", "meta", "metadata", "url")  # never missed
_ROLES = {"human": "user", "gpt": "assistant"}  # as conversations have them
_log = logging.getLogger(__name__)


class Roles(NamedTuple):
    """The names of columns; `context` goes below the text."""

    text: str
    pair: str | None
    label: str | None
    context: str | None


def read_examples(
    train: Table,
    dev: Table | None,
    kind: str = "auto",
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
) -> tuple[str, tuple[str, ...], list[Example], list[Example] | None]:
    """(kind, names of the classes, train, dev) of the rows of both tables.

    `text`, `pair` and `label` name columns; None is found by `LABELS`, `TEXTS` and `PROMPTS`, a
    pair only where `text` is not named. What "auto" is follows from the columns, from lists in the
    cells, and from the labels (`read_labels`). Columns that are not used are named in the log.

    Raises ValueError with the columns of the table for a column that is missing, and naming the row
    for text or labels that are missing, not finite, of another kind, or not among train's classes;
    for "auto" also where a column of `TAGS` has lists beside text that is not a list of words.
    """
    kind, roles = _roles(train, kind, text, pair, label)
    tables = [train] if dev is None else [train, dev]
    options = {"text": roles.text, "text_pair": roles.pair, "label": roles.label}
    for table in tables:
        for option, column in options.items():
            if column is not None and column not in table.columns:
                raise ValueError(f"data.{option}={column!r} is not a column: {_listed(table)}")
    tables = _parsed(tables, kind, roles)
    rows = [row for table in tables for row in table.rows]
    places = [place for table in tables for place in table.places]
    if kind == "auto" and isinstance(rows[0].get(roles.label or ""), list):
        words = isinstance(rows[0].get(roles.text), list)
        if not words and (roles.label or "").lower() in TAGS:
            raise ValueError(
                f"{places[0]}: {roles.text!r} is {rows[0].get(roles.text)!r:.200}, not a list of "
                f"words, which {roles.label!r} would be the tags of: name the column of words with "
                "data.text, or set data.task=multi_label_classification for labels of the sentence"
            )
        kind = "token_classification" if words else "multi_label_classification"
    texts, pairs = _texts(kind, rows, places, roles)
    n_train = len(train.rows)
    if not any(map(_has_content, chain(texts[:n_train], pairs[:n_train]))):
        where = _listed(train)
        raise ValueError(f"every {roles.text!r} of train is empty ({where}): check data.text")
    names: tuple[str, ...] = ()
    labels: Sequence[Any] = [None] * len(rows)
    if roles.label is not None:
        cells, declared = [row.get(roles.label) for row in rows], train.classes.get(roles.label, ())
        kind, names, labels = read_labels(kind, cells, places, n_train, declared)
        _check_labels(kind, texts, labels, cells, places)
        seen = labels[:n_train]
        found = {*chain(*seen)} - {IGNORED} if kind == "token_classification" else {*seen}
        if len(found) < 2:
            raise ValueError(
                f"every row of train has the label {cells[0]} ({_listed(train)}): there is "
                "nothing to learn; check data.label"
            )
    examples = list(map(Example, texts, pairs, labels))
    unused = [c for c in train.columns if c not in roles and c.lower() not in ASIDE]
    if unused:
        taken = ", ".join(column for column in roles if column is not None)
        _log.warning("%s: %s from %s; not used: %s", places[0], kind, taken, ", ".join(unused))
    return kind, names, examples[:n_train], None if dev is None else examples[n_train:]


def _parsed(tables: list[Table], kind: str, roles: Roles) -> list[Table]:
    """The tables with lists in place of their text, as CSV has them: in columns of conversations,
    or where all labels are lists, and then in a column of text where all cells are such lists.
    """

    def every(column: str, fits: Callable[[Any], bool]) -> bool:
        return all(fits(_list_in(row.get(column))) for table in tables for row in table.rows)

    columns = []
    if kind == "causal_lm":
        sides = [column for column in (roles.text, roles.pair) if column is not None]
        columns = [c for c in sides if c.lower() in CHATS or every(c, _is_whole_chat)]
    elif roles.label is not None and every(roles.label, _is_list):
        columns = [roles.label] + [roles.text] * every(roles.text, _is_list)
    if not columns:
        return tables
    return [
        table._replace(
            rows=[{**row, **{c: _list_in(row.get(c)) for c in columns}} for row in table.rows]
        )
        for table in tables
    ]


def _list_in(cell: Any) -> Any:
    """The list that a cell is the text of, as JSON or Python writes it; else the cell."""
    if not (isinstance(cell, str) and cell[:1] == "[" and cell[-1:] == "]"):
        return cell
    for read in (json.loads, ast.literal_eval):
        try:
            return read(cell)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue  # what Python's documentation names
    return cell


def _listed(table: Table) -> str:
    return f"{table.places[0]} has the columns {', '.join(table.columns)}"


def _roles(
    table: Table, kind: str, text: str | None, pair: str | None, label: str | None
) -> tuple[str, Roles]:
    """The kind, and the default columns where none are named."""
    if kind == "causal_lm" and label is not None:
        raise ValueError(f"data.label={label!r}: causal_lm has no label; use data.text_pair")
    causal, named = kind == "causal_lm", not text is pair is label is None
    columns = {column.lower(): column for column in reversed(table.columns)}
    row = {column: _list_in(cell) for column, cell in table.rows[0].items()}
    free = {low: column for low, column in columns.items() if column not in (text, pair, label)}

    def first(known: Sequence[str]) -> str | None:
        return next((columns[name] for name in known if name in columns), None)

    def find(known: Sequence[tuple[str, str | None]]) -> tuple[str | None, str | None]:
        whole = (names for names in known if {*free} | {None} >= {*names})
        a, b = next(whole, (None, None))
        return a and free[a], b and free[b]

    if not causal and label is None:
        label = first(LABELS)
    if kind == "auto" and label is None:
        chat = _is_chat(row.get(text or first(CHATS) or ""))
        alone = {*free} - {*ASIDE} == {"text"}
        causal = chat or (not named and (find(PAIRS) != (None, None) or alone))
    if not causal and label is None:
        label = first(MORE_LABELS)
    if label is None and not causal:
        raise ValueError(
            f"there is no label column: {_listed(table)}; name it with data.label, or set "
            "data.task=causal_lm for text without labels"
        )
    free = {low: column for low, column in free.items() if column != label}
    known = PROMPTS if causal else TEXTS
    lists = {low for low, column in free.items() if isinstance(row.get(column), list)}
    if label is not None and isinstance(row.get(label), list):
        known = tuple(sorted(TEXTS, key=lambda names: names[0] not in lists))  # words go first
    context = None
    if text is pair is None:
        text, pair = find(known)
        if causal and text and pair and not _is_chat(row.get(text)):
            others = {name: column for name, column in free.items() if column not in (text, pair)}
            context = next((others[name] for name in CONTEXTS if name in others), None)
    text = text or next((free[name] for name, _ in known if name in free), None)
    if text is None:
        raise ValueError(f"there is no text column: {_listed(table)}; name it with data.text")
    used = [column for column in (text, pair, label) if column is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"a column is used twice ({', '.join(used)}): text, pair and label differ")
    return "causal_lm" if causal else kind, Roles(text, pair, label, context)


def _is_list(cell: Any) -> bool:
    return isinstance(cell, list)


def _is_chat(cell: Any) -> bool:
    return isinstance(cell, list) and bool(cell) and all(isinstance(m, Mapping) for m in cell)


def _is_whole_chat(cell: Any) -> bool:
    return _is_chat(cell) and all(map(_message, cell))


def _has_content(text: Any) -> bool:
    return bool(text.strip() if isinstance(text, str) else text)


def _texts(
    kind: str, rows: Sequence[Mapping[str, Any]], places: Sequence[str], roles: Roles
) -> tuple[list[Any], list[Any]]:
    """(texts, pairs)"""
    texts, pairs = [], []
    for row, place in zip(rows, places, strict=True):
        text, pair = _cell(kind, row, place, roles.text), None
        if roles.pair is not None:
            pair = _cell(kind, row, place, roles.pair)
        if roles.context is not None and row.get(roles.context):
            text = f"{text}\n\n{_cell(kind, row, place, roles.context)}"
        if kind == "causal_lm" and tuple in (type(text), type(pair)):
            text, pair = _joined(text, pair, place), None
        texts.append(text)
        pairs.append(pair)
    odd = next((i for i, text in enumerate(texts) if type(text) is not type(texts[0])), None)
    if odd is not None:
        raise ValueError(
            f"only one of {places[0]} and {places[odd]} is a conversation: "
            "put them into separate files"
        )
    return texts, pairs


def _joined(text: Any, pair: Any, place: str) -> tuple[Any, ...]:
    """One conversation; prompt and completion may each be a part of it."""
    if not isinstance(text, tuple) or not isinstance(pair, tuple | None):
        raise ValueError(f"{place}: only one of prompt and completion is a list of messages")
    asked = ({**m, ASKED: True} if pair and m["role"] == "assistant" else m for m in text)
    messages = (*asked, *(pair or ()))
    if not any(m["role"] == "assistant" and not m.get(ASKED) for m in messages):
        raise ValueError(f"{place} has no assistant's turn to learn from")
    return messages


def _cell(kind: str, row: Mapping[str, Any], place: str, column: str) -> str | tuple[Any, ...]:
    """A text, or as a tuple: the words of token_classification, the messages of causal_lm."""
    cell = row.get(column)
    wanted = "not text"
    if kind == "token_classification":
        if isinstance(cell, list) and cell and all(isinstance(word, str) for word in cell):
            return tuple(cell)
        wanted = "not a list of words"
    elif kind == "causal_lm" and (_is_chat(cell) or column.lower() in CHATS):
        given = cell if isinstance(cell, list) else []
        messages = list(map(_message, given))
        if messages and all(messages):
            return tuple(messages)
        wanted = "not a list of messages with role and content as text"
        if messages:
            wanted += f" (see {given[messages.index(None)]!r:.200})"
    elif isinstance(cell, str):
        if _is_unicode(cell):
            return cell
        cell, wanted = ascii(cell), "not whole Unicode (half of a surrogate pair)"
    raise ValueError(f"{place}: {column!r} is {cell!r:.200}, {wanted}: fill it or drop the row")


def _is_unicode(text: str) -> bool:
    try:
        return bool(text.encode() or True)
    except UnicodeEncodeError:
        return False


def _message(given: Any) -> dict[str, Any] | None:
    """One with a role and its content, whose parts are joined where all are text, or None."""
    if not isinstance(given, Mapping):
        return None
    made = {key: value for key, value in given.items() if value is not None}
    if "role" not in made and {"from", "value"} <= {*made}:
        role, content = made.pop("from"), made.pop("value")
        made = {"role": _ROLES.get(role, role), "content": content, **made}
    content = made.get("content", "")
    if isinstance(content, list) and all(map(_is_text, content)):
        made["content"] = content = "".join(part["text"] for part in content)
    told = isinstance(made.get("role"), str) and isinstance(content, str)
    return made if told and {"content", "tool_calls"} & {*made} else None


def _is_text(part: Any) -> bool:
    known = isinstance(part, Mapping) and part.get("type") == "text"
    return known and isinstance(part.get("text"), str)


def _check_labels(
    kind: str, texts: Sequence[Any], labels: Sequence[Any], cells: Sequence[Any], places: Any
) -> None:
    """Raises ValueError for a row of words with more or fewer labels than words."""
    for text, label, cell, place in zip(texts, labels, cells, places, strict=True):
        if kind == "token_classification" and len(text) != len(label):
            raise ValueError(
                f"{place} has {len(text)} words and {len(label)} labels ({cell!r:.200}): each word "
                "needs one"
            )
