"""Which rows training takes when: a run that goes on in the data where another one ended."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs as tiny
from transformers import TrainerCallback, default_data_collator

from loradrop import LoRAConfig, Spectral, TrainConfig
from loradrop.methods import LoRA, Method
from loradrop.training.order import Onward


def stream(start: int, passes: int, rows: int = 7, seed: int = 3) -> list[int]:
    sampler = Onward(rows, seed, start)
    assert len(sampler) == rows
    return [row for _ in range(passes) for row in sampler]


def test_every_pass_has_every_row_in_an_order_of_its_own() -> None:
    found = stream(0, 4)
    passes = [found[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    assert found == stream(0, 4) != stream(0, 4, seed=4)


@pytest.mark.parametrize("start", [1, 5, 7, 10, 14])
def test_it_begins_anywhere_in_the_same_sequence(start: int) -> None:
    assert stream(start, 2) == stream(0, 5)[start : start + 14]


def test_a_pass_can_be_chosen() -> None:
    sampler = Onward(7, 3, 4)
    whole = stream(4, 3)
    for number in (2, 0, 1):
        sampler.set_epoch(number)
        assert list(sampler) == whole[7 * number : 7 * number + 7]


@pytest.mark.parametrize("rows", [1, 7, 400, 403])
def test_batches_of_like_length_come_at_random(rows: int) -> None:
    lengths = torch.randint(1, 100, (rows,), generator=torch.Generator().manual_seed(1)).tolist()
    sampler = Onward(rows, 3, 0, lengths, 4)
    first, second = list(sampler), list(sampler)
    for found in (first, second):
        assert sorted(found) == list(range(rows))
        batches = [[lengths[row] for row in found[i : i + 4]] for i in range(0, rows, 4)]
        if rows >= 400:
            assert sum(max(batch) * len(batch) for batch in batches) < 1.15 * sum(lengths)
            longest = [max(batch) for batch in batches]
            assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
        assert all(len(batch) == 4 for batch in batches[:-1])
    assert (first == second) == (rows == 1)
    assert [*Onward(rows, 3, 3, lengths, 4)][: rows - 3] == first[3:]


@pytest.mark.parametrize("method", [LoRA(), Spectral(cut_at=4, source="online")])
def test_a_run_groups_rows_by_length_over_both_stages(method: Method, tmp_path: Path) -> None:
    """As transformers' option says, and in the order in which it goes on."""
    rows = [{"input_ids": [5] * (1 + i % 11), "labels": i % 2} for i in range(44)]
    seen: list[int] = []

    def collate(batch: list[Any]) -> Any:
        longest = max(len(row["input_ids"]) for row in batch)
        seen.extend(len(row["input_ids"]) for row in batch)
        ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch]
        return {
            "input_ids": torch.tensor(ids), "attention_mask": (torch.tensor(ids) != 0).long(),
            "labels": torch.tensor([row["labels"] for row in batch]),
        }  # fmt: skip

    args = TrainConfig(steps=11, batch_size=4, extra={"train_sampling_strategy": "group_by_length"})
    steps = Steps(seen)
    lora = LoRAConfig(**tiny.LORA, method=method)
    tiny.run(tmp_path, lora, args, train=rows, dev=None, collate=collate, callbacks=[steps])
    whole = list(Onward(44, args.seed, 0, [1 + i % 11 for i in range(44)], 4))
    expected = [1 + row % 11 for row in whole]
    if isinstance(method, LoRA):
        assert seen[:44] == expected
    else:
        assert seen[steps.began[1] :][:16] == expected[:16]
        assert seen[steps.began[2] :][:28] == expected[16:]


class Steps(TrainerCallback):
    """How many batches were collated when each stage began."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen, self.began = seen, [0]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began.append(len(self.seen))


@pytest.mark.parametrize("warm", [2, 4, 8])
def test_the_second_stage_takes_the_rows_that_come_next(warm: int, tmp_path: Path) -> None:
    """Of 44 rows in batches of 8, six to a pass: no row a second time before all had their turn."""
    rows = tiny.make_rows()
    number = {tuple(row["input_ids"].tolist()): i for i, row in enumerate(rows)}
    seen: list[list[int]] = []

    def collate(batch: list[Any]) -> Any:
        seen.append([number[tuple(row["input_ids"].tolist())] for row in batch])
        return default_data_collator(batch)

    lora = LoRAConfig(**tiny.LORA, method=Spectral(cut_at=warm, source="online"))
    args = TrainConfig(steps=14, batch_size=8, learning_rate=1e-2)
    steps = Steps(seen)
    tiny.run(tmp_path, lora, args, train=rows, dev=None, collate=collate, callbacks=[steps])
    first = seen[steps.began[1] : steps.began[1] + warm]
    second = seen[steps.began[2] : steps.began[2] + 14 - warm]
    taken = [row for batch in first + second for row in batch]
    assert len(number) == 44
    assert max(Counter(taken[:44]).values()) == 1
    assert max(Counter(taken[:88]).values()) <= 2
    torch.manual_seed(0)  # what others draw does not matter
    assert taken[:8] == list(Onward(44, args.seed, 0))[:8]
