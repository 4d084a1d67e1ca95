"""What a model writes is judged by the number at its end, as GSM8K's answers are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_size_tables import write
from torch import Tensor

from lib.answers import Questions, agreement, number_of, written
from lib.size_tables import answers
from loradrop.text.labels import IGNORED


class Letters:
    """A tokenizer whose tokens are letters; 0 pads."""

    pad_token_id = 0

    def decode(self, ids: Any) -> str:
        return "".join(chr(i) for i in ids if i)

    def batch_decode(self, rows: Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [self.decode(row) for row in rows.tolist()]

    def pad(self, rows: Any, padding_side: str, return_tensors: str) -> dict[str, Tensor]:
        assert (padding_side, return_tensors) == ("left", "pt")
        ids = rows["input_ids"]
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        return {"input_ids": padded, "attention_mask": (padded != 0).long()}


class Parrot:
    """A model that has an answer for each prompt."""

    def __init__(self, **answers: str) -> None:
        self.answers = answers

    def eval(self) -> None: ...

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        said = [self.answers[Letters().decode(row)] for row in input_ids.tolist()]
        width = max(map(len, said))
        ids = [[*map(ord, text), *[0] * (width - len(text))] for text in said]
        return torch.cat((input_ids, torch.tensor(ids)), 1)


def row(prompt: str, answer: str) -> dict[str, Any]:
    ids = [*map(ord, prompt + answer)]
    return {"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]}


@pytest.mark.parametrize(
    "answer, number",
    [
        ("2 + 3 = 5\n#### 5", "5"), ("#### 1,234", "1234"), ("#### $-7.50", "-7.50"),
        ("####.5", ".5"), ("#### 5.", "5"), ("5", None), ("#### five", None),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(answer: str, number: str | None) -> None:
    assert number_of(answer) == number


def test_no_number_is_like_no_other() -> None:
    assert agreement(["1", None, "2", None], ["1", None, "3", "4"]) == 0.25


@pytest.mark.parametrize("size", [1, 2, 9])
def test_prompts_of_other_lengths_get_their_own_answers(size: int) -> None:
    model = Parrot(a="one", bcd="two and more", ef="three")
    prompts = [[*map(ord, prompt)] for prompt in model.answers]
    assert written(model, prompts, Letters(), size) == ["one", "two and more", "three"]


def test_answers_are_compared_with_the_right_ones_and_with_the_first() -> None:
    rows = [row("a", "#### 1"), row("cut", "2 + 2"), row("b", "#### 2"), row("c", "#### 3"),
            row("d", "#### 4"), row("more", "#### 5")]  # fmt: skip
    model = Parrot(a="#### 1", b="#### 9", c="?", d="#### 4")
    questions = Questions(model, rows, Letters(), 4)
    assert questions.uncut == {"answers": 4, "exact": 0.5, "same": 0.75}
    model.answers |= {"a": "#### 7", "c": "#### 3"}
    assert questions.judged() == {"answers": 4, "exact": 0.5, "same": 0.5}
    assert Questions(model, rows, Letters(), 0).judged() == {}


def test_the_table(tmp_path: Path) -> None:
    facts = {"task": "t", "seed": 0, "answers": 4}
    cells = [
        facts | {"arm": "uncut", "budget": 1.0, "exact": 0.5, "same": 1.0},
        facts | {"arm": "loss", "budget": 0.25, "exact": 0.25, "same": 0.75},
        {"task": "u", "seed": 0, "arm": "loss", "budget": 0.5},
    ]
    table = answers(write(tmp_path, "bench_cut", cells))
    assert table is not None and table.splitlines() == [
        "| t, 4 answers | 1 left | 0.25 left |",
        "| --- | ---: | ---: |",
        "| uncut | 50; 100 | – |",
        "| loss | – | 25; 75 |",
    ]
