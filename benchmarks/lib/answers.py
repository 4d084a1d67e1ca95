"""What a language model writes as an answer, and the number that it ends with, as in GSM8K."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from loradrop.text.labels import IGNORED

LONGEST = 200  # tokens of an answer
_NUMBER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


def number_of(answer: str) -> str | None:
    """What stands behind "####", without commas; None where there is none."""
    found = _NUMBER.search(answer)
    return None if found is None else found[1].replace(",", "")


def agreement(found: Sequence[str | None], others: Sequence[str | None]) -> float:
    """The part of the answers with the same number; no number is like no other."""
    same = (a is not None and a == b for a, b in zip(found, others, strict=True))
    return sum(same) / len(found)


@torch.no_grad()
def written(model: Any, prompts: Sequence[list[int]], tokenizer: Any, size: int = 25) -> list[str]:
    """What the model goes on with after each prompt, always the likeliest token; `size` at once."""
    model.eval()
    texts = []
    for at in range(0, len(prompts), size):
        some = {"input_ids": prompts[at : at + size]}
        batch = tokenizer.pad(some, padding_side="left", return_tensors="pt")
        end = tokenizer.pad_token_id
        found = model.generate(**batch, do_sample=False, max_new_tokens=LONGEST, pad_token_id=end)
        new = found[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


class Questions:
    """The first `count` rows of dev whose answer has a number, and what the model answers as it is
    now: `judged` compares later answers with both. Rows are cut at a length, some before the
    number; those few that are cut within it can only be answered wrong.
    """

    def __init__(
        self, model: Any, rows: Sequence[dict[str, Any]], tokenizer: Any, count: int
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._prompts, self._right = list[list[int]](), list[str]()
        for row in rows:
            if len(self._right) == count:
                break
            at = row["labels"].count(IGNORED)
            number = number_of(tokenizer.decode(row["input_ids"][at:]))
            if number is not None:
                self._prompts.append(row["input_ids"][:at])
                self._right.append(number)
        self._first = self._numbers()
        self.uncut = self._compared(self._first)

    def judged(self) -> dict[str, float]:
        """The part of the answers that are right now (`exact`), and that have the number which the
        model gave at first (`same`); nothing without questions.
        """
        return self._compared(self._numbers())

    def _numbers(self) -> list[str | None]:
        texts = written(self._model, self._prompts, self._tokenizer)
        return [number_of(text) for text in texts]

    def _compared(self, found: Sequence[str | None]) -> dict[str, float]:
        if not found:
            return {}
        exact, same = agreement(found, self._right), agreement(found, self._first)
        return {"answers": len(found), "exact": exact, "same": same}
