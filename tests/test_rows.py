"""The data of a configuration as the base model of an adapter reads it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from run_cases import turn, write_model, write_table
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loradrop.command.rows import rows_for
from loradrop.text.examples import Example, TextTask, renumbered
from loradrop.text.task import DataConfig


def classifier(where: str, *names: str) -> Any:
    """With classes of these names, in this order."""
    labels: dict[str, Any] = {"id2label": dict(enumerate(names))}
    labels["label2id"] = {name: i for i, name in enumerate(names)}
    return AutoModelForSequenceClassification.from_pretrained(where, **labels)


def read(where: str, model: Any, tmp_path: Path) -> Any:
    data = DataConfig(source=write_table(tmp_path / "films.csv"), max_length=16)
    return rows_for(model, data, tmp_path)


def test_classes_are_those_of_the_model_by_name(tmp_path: Path) -> None:
    where = write_model(tmp_path / "base")
    usual = read(where, classifier(where, "bad", "good"), tmp_path)
    turned = read(where, classifier(where, "good", "bad"), tmp_path)
    assert usual.task.labels == ("bad", "good") and turned.task.labels == ("good", "bad")
    for one, other in ((usual.train, turned.train), (usual.dev, turned.dev)):
        for row, same in zip(one.rows, other.rows, strict=True):
            assert row["input_ids"] == same["input_ids"] and row["labels"] == 1 - same["labels"]


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1"), ("0", "1"), ("good", "awful")])
def test_other_classes_are_taken_in_their_order(
    names: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = write_model(tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        assert read(where, classifier(where, *names), tmp_path).task.labels == ("bad", "good")
    said = f"the classes of the data (bad, good) are not those of {tmp_path} (good, awful)"
    assert (said in caplog.text) == (names == ("good", "awful"))


def test_lists_of_classes_are_renumbered() -> None:
    rows = (Example("a b c", None, (0, 2, -100)), Example("d", None, ()))
    task = TextTask("tags", "token_classification", ("x", "y", "z"), rows, (), "f1", {})
    found = renumbered(task, ("z", "x", "y"))
    assert found.labels == ("z", "x", "y") and found.dev == ()
    assert [row.label for row in found.train] == [(1, 0, -100), ()]


def test_the_tokenizer_is_that_of_the_adapter(tmp_path: Path) -> None:
    """As TRL leaves it beside an adapter: of a base without a chat template."""
    where = write_model(tmp_path / "base", "llama")
    adapter = tmp_path / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(where)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    )
    chats = tmp_path / "chats.jsonl"
    talk = [turn("user", "the film is it"), turn("assistant", "so it was good")]
    chats.write_text("\n".join([json.dumps({"messages": talk})] * 24))
    model, data = AutoModelForCausalLM.from_pretrained(where), DataConfig(source=str(chats))
    with pytest.raises(ValueError, match="chat template"):
        rows_for(model, data, adapter)
    tokenizer.save_pretrained(adapter)
    assert len(rows_for(model, data, adapter).train) > 0
