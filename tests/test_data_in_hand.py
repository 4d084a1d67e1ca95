"""Data and base models as people have them: what is learned, what is left out, and what is said."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import Capsys, command, fails, works
from run_cases import turn, write_model, write_table, write_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
)

from loradrop.command.base_models import _require_causal, build, pad_with
from loradrop.command.run import run
from loradrop.command.run_config import read_config
from loradrop.text.task import DataConfig, load_task
from loradrop.text.tokens import tokenize

CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} [SEP] {% endfor %}"
PROMPT = "{% if add_generation_prompt %}assistant {% endif %}"


def lines(file: Path, rows: list[Any]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def made(where: str, data: str, *more: str, **options: Any) -> Any:
    config = read_config(None, [f"model={where}", f"data={data}", "data.dev_ratio=0.5", *more])
    return build(config, load_task(config.data), **options)


@pytest.fixture
def bert(tmp_path: Path) -> str:
    return write_model(tmp_path / "bert")


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return write_model(tmp_path / "llama", "llama")


@pytest.mark.parametrize("names", [("good", "bad"), ("Good", "BAD")])
def test_a_head_keeps_the_order_of_its_classes(
    names: tuple[str, str], bert: str, tmp_path: Path
) -> None:
    """Its weights say good or bad by their place, so training begins with what it knew."""
    labels = dict(enumerate(names))
    model = AutoModelForSequenceClassification.from_pretrained(bert, id2label=labels)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([50.0, -50.0]))
    model.save_pretrained(tmp_path / "trained")
    write_tokenizer(tmp_path / "trained")
    data = tmp_path / "films.csv"
    data.write_text("text,label\n" + "a good film,good\n" * 19 + "a bad film,bad\n")
    options = [f"model={tmp_path / 'trained'}", f"data={data}", f"data.dev={data}", "method=lora"]
    options += ["train.learning_rate=1e-9", "train.steps=1", f"output={tmp_path / 'run'}"]
    [result] = run(read_config(None, options)).values()
    assert result.metrics["accuracy"] == pytest.approx(0.95)
    assert result.plan.base["labels"] == ["good", "bad"]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_model_that_sees_what_comes_does_not_write(family: str, tmp_path: Path) -> None:
    where = write_model(tmp_path / family, family)
    data = lines(tmp_path / "p.jsonl", [{"prompt": "a film", "completion": "good"}] * 8)
    with pytest.raises(ValueError, match=r"cannot be trained to write: .*is_decoder=True"):
        made(where, data)
    config = AutoConfig.from_pretrained(where)
    config.is_decoder = True
    config.save_pretrained(where)
    model, _, _ = made(where, data)
    assert model.config.is_decoder


def test_a_decoder_of_a_family_with_masks_writes() -> None:
    """BART's, with other numbers of layers in its encoder, which a cache would count."""
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32}
    _require_causal("bart", BartForCausalLM(BartConfig(vocab_size=64, **sizes, **heads)))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    """As a decoder alone it would begin with embeddings that nobody trained."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32}
    model = BartForConditionalGeneration(BartConfig(vocab_size=64, **sizes, **heads))
    model.save_pretrained(tmp_path / "bart")
    write_tokenizer(tmp_path / "bart")
    data = write_table(tmp_path / "table.jsonl", "causal")
    with pytest.raises(ValueError, match=r"bart' is an encoder–decoder \(bart\).*Seq2SeqTrainer"):
        made(str(tmp_path / "bart"), data)


def test_assistants_of_a_prompt_are_not_learned(llama: str, tmp_path: Path) -> None:
    asked = [turn("user", "a"), turn("assistant", "good film"), turn("user", "the")]
    rows = [{"prompt": asked, "completion": [turn("assistant", "bad")]}] * 4
    task = load_task(DataConfig(source=lines(tmp_path / "c.jsonl", rows), dev_ratio=0.5))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    said = "{% generation %}{{ m.content }} [SEP]{% endgeneration %}"
    said = "{% if m.role == 'user' %}{{ m.content }} [SEP]{% else %}" + said + "{% endif %}"
    marked = CHAT.replace("{{ m.content }} [SEP]", said)
    for template in (CHAT + PROMPT, marked + PROMPT):
        tokenizer.chat_template = template
        row = tokenize(task, tokenizer, 32)[0][0]
        learned = [t for t in row["labels"] if t != -100]
        assert tokenizer.decode(learned).replace(" ", "") == "bad[SEP]", template


def test_turns_that_cannot_be_found_are_told(
    llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A template that leaves the content of earlier turns out."""
    rows = [{"messages": [turn("user", "a"), turn("assistant", "good"), turn("user", "the"),
                          turn("assistant", "bad")]}] * 4  # fmt: skip
    task = load_task(DataConfig(source=lines(tmp_path / "c.jsonl", rows), dev_ratio=0.5))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    said = "{{ m.content if m.role == 'user' or loop.last else '' }}"
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", said) + PROMPT
    learned = [t for t in tokenize(task, tokenizer, 32)[0][0]["labels"] if t != -100]
    assert tokenizer.decode(learned).replace(" ", "") == "bad[SEP]"
    assert "2 of 4 turns of the assistant are not found" in caplog.text


def test_which_file_is_dev(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, rows in (("train", 24), ("val", 10), ("test", 6)):
        write_table(tmp_path / f"{name}.csv", rows=rows)
    assert len(load_task(DataConfig(source=str(tmp_path))).dev) == 10
    (tmp_path / "val.csv").rename(tmp_path / "eval.csv")
    assert len(load_task(DataConfig(source=str(tmp_path))).dev) == 10
    assert not caplog.text
    (tmp_path / "eval.csv").unlink()
    assert len(load_task(DataConfig(source=str(tmp_path))).dev) == 6
    assert "dev is test.csv: what is chosen by it" in caplog.text
    (tmp_path / "test.csv").write_text("id,text\n1,a film\n")
    task = load_task(DataConfig(source=str(tmp_path), dev_ratio=0.25))
    assert (len(task.train), len(task.dev)) == (18, 6)
    assert "test.csv lacks label: it is not taken as dev" in caplog.text


@pytest.mark.parametrize(
    ("own", "there", "padded", "warned"),
    [("[PAD]", None, 0, False), (None, 4, 4, False), (None, None, 3, False), ("[PAD]", 4, 0, True),
     (None, 99, 3, True)],
)  # fmt: skip
def test_model_and_tokenizer_pad_alike(
    own: str | None, there: int | None, padded: int, warned: bool, llama: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForSequenceClassification.from_pretrained(llama)
    tokenizer.pad_token, model.config.pad_token_id = own, there
    pad_with(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id == padded
    assert ("the model pads with token" in caplog.text) == warned


def test_special_tokens_of_ones_own_stay(llama: str, tmp_path: Path) -> None:
    """What the tokenizer adds at the end of a prompt goes, and no end comes twice."""
    adding = AutoTokenizer.from_pretrained(llama)
    silent = AutoTokenizer.from_pretrained(llama)
    silent.backend_tokenizer.post_processor = None
    rows = [{"prompt": "a film [SEP]", "completion": "\ngood"},
            {"prompt": "a film", "completion": "good [SEP]"}] * 2  # fmt: skip
    task = load_task(DataConfig(source=lines(tmp_path / "p.jsonl", rows), dev_ratio=0.5))
    for tokenizer, first in ((silent, ""), (adding, "[CLS]")):
        found = {
            tokenizer.decode(row["input_ids"]).replace(" ", "")
            for row in (*tokenize(task, tokenizer, 16)[0].rows, *tokenize(task, tokenizer)[1].rows)
        }
        assert found == {f"{first}afilm[SEP]good[SEP]", f"{first}afilmgood[SEP]"}


@pytest.fixture(params=[str, json.dumps])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Writes rows into a CSV file: lists as Python, or JSON, writes them."""

    def written(name: str, header: str, rows: list[tuple[Any, ...]]) -> str:
        cells = [[c if isinstance(c, str) else request.param(c) for c in row] for row in rows]
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([header.split(","), *cells])
        return str(tmp_path / name)

    return written


def test_blanks_around_the_names_of_columns(table: Any) -> None:
    path = table("a.csv", "text , label", [("x", "good"), ("y", "bad")] * 4)
    task = load_task(DataConfig(source=path))
    assert task.labels == ("bad", "good") and task.train[0].text == "x"


def test_lists_in_csv(table: Any) -> None:
    many = table("m.csv", "text,labels", [("x", ["a", "c"]), ("y", ["b"]), ("z", ["c"])] * 4)
    task = load_task(DataConfig(source=many))
    assert (task.kind, task.labels) == ("multi_label_classification", ("a", "b", "c"))
    words = [("a b", ["a", "b"], [0, 1]), ("c", ["c"], [1])] * 4
    for first in (0, 1):  # the text that the words are of may stand beside them
        header = ",".join(("text", "tokens", "ner_tags")[first:])
        source = table("w.csv", header, [row[first:] for row in words])
        task = load_task(DataConfig(source=source))
        assert task.kind == "token_classification" and task.train[0].text in (("a", "b"), ("c",))


@pytest.mark.parametrize("options", [{}, {"task": "causal_lm"}])
def test_conversations_in_csv(options: Any, table: Any) -> None:
    asked, said = [turn("user", "It's a"), turn("user", "b")], [turn("assistant", "c")]
    for header, row in (
        ("Messages", ([*asked, *said],)),
        ("prompt,completion", (asked, said)),
        ("id,talk", ("1", [*asked, *said])),
    ):
        text = {"text": "talk"} if "talk" in header else {}
        path = table("c.csv", header, [row] * 4)
        made = load_task(DataConfig(source=path, **text, **options))
        assert made.kind == "causal_lm" and made.train[0] == ((*asked, *said), None, None)
    path = table("b.csv", "messages", [([*asked, *said],), ("[a]",)])
    with pytest.raises(ValueError, match=r"b\.csv:3: 'messages' is '\[a\]', not a list of mes"):
        load_task(DataConfig(source=path, **options))


@pytest.mark.parametrize(
    "text", ["[sic]", "[{[]: 1}]", '[{"name": "f", "arguments": {}}]', "[" * 9999 + "]"]
)
def test_text_that_looks_like_a_list_is_text(text: str, table: Any) -> None:
    """Of a call that a model learns to write, too."""
    talk = [turn("user", "a"), turn("assistant", "b")]
    for cells in ([text] * 4, [talk, talk, talk, text]):
        path = table("t.csv", "prompt,completion", [("a", cell) for cell in cells])
        made = load_task(DataConfig(source=path, dev=path))
        assert made.train[3].pair == text and isinstance(made.train[0].pair, str)


def test_a_run_keeps_its_report(tmp_path: Path, bert: str, capsys: Capsys) -> None:
    table, output = write_table(tmp_path / "t.csv"), f"output={tmp_path / 'run'}"
    options = ("train", f"model={bert}", f"data={table}", "train.steps=4", "train.batch_size=8")
    works(capsys, *options, "method=lora", output)
    before = (tmp_path / "run" / "report.html").read_bytes()
    fails(capsys, "holds a run already", *options, "method=vera", output)
    assert (tmp_path / "run" / "report.html").read_bytes() == before


def test_rows_that_say_nothing(
    llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Blank ones are left out of what is learned whole, and named where they have a label."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.backend_tokenizer.post_processor = None
    rows: list[dict[str, Any]] = [{"text": text} for text in ("a good film", "", "the film")] * 4
    task = load_task(DataConfig(source=lines(tmp_path / "t.jsonl", rows), dev_ratio=0.25))
    train, dev = tokenize(task, tokenizer, 16)
    assert len(train) + len(dev) == 8 and min(len(row["labels"]) for row in train.rows) > 1
    assert "rows have no token to learn, as blank ones: they are left out" in caplog.text
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(("a", "", "the", "film"))]
    task = load_task(DataConfig(source=lines(tmp_path / "l.jsonl", rows * 3), dev_ratio=0.5))
    with pytest.raises(ValueError, match=r"texts have no token \(the first is ''\)"):
        tokenize(task, tokenizer, 16)


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "a", "label": 1}\n{"text": "bad \\ud83d end", "label": 0}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:2: 'text' is .*ud83d.*not whole Unicode"):
        load_task(DataConfig(source=str(file)))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_that_classify_can_be_verified(
    family: str, tmp_path: Path, capsys: Capsys
) -> None:
    sizes: dict[str, Any] = {
        "t5": {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8},
        "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48,
                 "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                 "max_position_embeddings": 40},
    }  # fmt: skip
    torch.manual_seed(0)
    tokens = {"eos_token_id": 3, "pad_token_id": 0, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(family, vocab_size=64, num_labels=2, **sizes[family], **tokens)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base", pairs=False)
    table, targets = write_table(tmp_path / "t.csv"), "q,v" if family == "t5" else "q_proj,v_proj"
    works(
        capsys, "train", f"model={tmp_path / 'base'}", f"data={table}", "method=lora",
        f"output={tmp_path / 'run'}", f"lora.target_modules=[{targets}]",
        "train.steps=4", "train.batch_size=8",
    )  # fmt: skip
    adapter, merged = tmp_path / "run" / "lora" / "adapter", tmp_path / "merged"
    works(capsys, "merge", adapter, merged)
    assert "ok" in works(capsys, "verify", adapter, merged)


@pytest.mark.parametrize(
    ("text", "message"),
    [("train: {steps: 3}\ntrain: {seed: 2}\n", "'train' comes twice"),
     ("lora:\n  r: 2\n  r: 4\n", "'r' comes twice"),
     ("model: caf\udce9\n", "is not UTF-8")],
)  # fmt: skip
def test_files_that_would_be_half_read(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_config(file)
    file.write_text("output:\nname:\n")
    config = read_config(file)
    assert (config.output, config.name) == ("runs/loradrop", "LoRA-drop")


def test_a_tilde_that_the_shell_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (["plan", "show", "~/x.json"], ["plan", "plot", "~/x.json", "--out=~/y.png"]):
        fails(capsys, f"{tmp_path}/x.json is not there", *arguments)


@pytest.mark.parametrize("count", [-1, 0])
def test_batches_that_are_no_number_of_batches(count: int, capsys: Capsys) -> None:
    status, _, error = command(capsys, "probe", "--adapter", "x", "--batches", count)
    assert status == 2 and "Invalid value for '--batches'" in error


def test_quiet_data_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_task(DataConfig(source=write_table(tmp_path / "t.csv")))
    assert not caplog.text
