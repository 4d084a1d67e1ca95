"""Rows from files, folders and the hub: roles, labels, splits, draws, and each refusal."""

import csv
import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from loradrop.text.examples import Example
from loradrop.text.task import DataConfig, load_task


def write(path: Path, text: str) -> str:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_a_folder_of_tsv_knows_no_quotes_and_reads_digits_as_classes(tmp_path):
    header = "sentence1\tsentence2\tlabel\n"
    write(tmp_path / "train.tsv.gz", header + '"So", he\tsaid\t1\r\na "b\tc\t0\n')
    write(tmp_path / "dev.tsv.gz", header + "x\ty\t1\n")
    made = load_task(DataConfig(source=str(tmp_path)))
    assert made.train == (Example('"So", he', "said", 1), Example('a "b', "c", 0))
    assert made.dev == (Example("x", "y", 1),)
    assert (made.kind, made.labels, made.metric) == ("classification", ("0", "1"), "accuracy")
    assert made.name == tmp_path.name


def test_csv_has_quotes_and_words_are_sorted_classes(tmp_path):
    source = write(tmp_path / "r.csv", 'id,text,label\n1,"a, ""b""\nc",pos\n2,d,neg\n3,e,pos\n')
    dev = write(tmp_path / "other.csv", "text,label\nz,neg\n")
    made = load_task(DataConfig(source=source, dev=dev))
    assert made.labels == ("neg", "pos") and made.dev == (Example("z", None, 0),)
    assert made.train[0] == Example('a, "b"\nc', None, 1)


def test_a_cell_may_be_as_long_as_the_file(tmp_path):
    before = csv.field_size_limit()
    lines = "".join(f"{'x' * 200_000},{i % 2}\n" for i in range(2))
    path = write(tmp_path / "long.csv", "text,label\n" + lines)
    assert len(load_task(DataConfig(source=path, dev=path)).train[0].text) == 200_000
    assert csv.field_size_limit() == before


def test_whole_number_classes_stay_in_numeric_order(tmp_path):
    lines = "".join(f"t{i}\t{label}\n" for i, label in enumerate([10, 9, -1, 10, 9, -1] * 4))
    made = load_task(DataConfig(source=write(tmp_path / "n.tsv", "text\tlabel\n" + lines)))
    assert made.labels == ("-1", "9", "10")
    label = {row.text: row.label for row in (*made.train, *made.dev)}
    assert [label[f"t{i}"] for i in range(3)] == [2, 1, 0]


def test_fractions_are_a_regression_and_cola_has_its_metric(tmp_path):
    write(tmp_path / "train.jsonl", '{"text": "a", "label": 1.5}\n{"text": "b", "label": 2}\n')
    write(tmp_path / "validation.jsonl", '{"text": "c", "label": 0.25}\n')
    made = load_task(DataConfig(source=str(tmp_path / "train.jsonl")))
    assert (made.kind, made.labels, made.metric) == ("regression", (), "pearson")
    assert [row.label for row in made.train + made.dev] == [1.5, 2.0, 0.25]
    cola = write(tmp_path / "cola.tsv", "sentence\tlabel\n" + "a\t0\nb\t1\n" * 10)
    assert load_task(DataConfig(source=cola)).metric == "matthews"
    forced = load_task(DataConfig(source=cola, task="regression"))
    assert forced.kind == "regression" and {row.label for row in forced.train} == {0.0, 1.0}


def test_prompts_with_completions_are_a_language_modelling_task(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f"a\n{i}"} for i in range(10)]
    source = write(tmp_path / "m.jsonl.gz", "\n".join(map(json.dumps, rows)))
    made = load_task(DataConfig(source=source, dev_ratio=0.2))
    assert (made.kind, made.metric, len(made.train), len(made.dev)) == ("causal_lm", "loss", 8, 2)
    assert {*made.train, *made.dev} == {Example(f"q{i}", f"a\n{i}", None) for i in range(10)}
    alone = load_task(DataConfig(source=source, task="causal_lm", text="completion"))
    assert alone.train[0].pair is None and alone.train[0].text.startswith("a\n")
    write(tmp_path / "t.csv", "sentence1,sentence2\na,b\nc,d\n")
    whole = DataConfig(source=str(tmp_path / "t.csv"), task="causal_lm", text="sentence2")
    assert {*load_task(whole).train} < {Example("b", None, None), Example("d", None, None)}


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ("text sentence label", {}, ("a", None)),
        ("id sentence label", {}, ("b", None)),
        ("sentence2 sentence1 label", {}, ("b", "a")),
        ("premise hypothesis label", {}, ("a", "b")),
        ("question1 question2 label", {}, ("a", "b")),
        ("question sentence label", {}, ("a", "b")),
        ("question sentence label", {"text": "sentence"}, ("b", None)),
        ("question sentence label", {"text_pair": "question"}, ("b", "a")),
        ("prompt completion label", {"text": "prompt"}, ("a", None)),
        ("body title label", {"text": "title", "text_pair": "body"}, ("b", "a")),
        ("text other grade", {"label": "grade"}, ("a", None)),
        ("label text grade", {"label": "grade"}, ("b", None)),
    ],
)
def test_columns_are_those_named_or_well_known(tmp_path, columns, options, expected):
    lines = [columns.split(), *(["a", "b", str(i % 2)] for i in range(20))]
    source = write(tmp_path / "c.tsv", "\n".join(map("\t".join, lines)))
    row = load_task(DataConfig(source=source, **options)).train[0]
    assert (row.text, row.pair) == expected


def dump(path: Path, rows: list) -> str:
    return write(path, "\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        (["0.0", "1.0"], "classification", ("0", "1")),
        ([0.0, 1.0, 1, "1", "0."], "classification", ("0", "1")),
        (["-1.0", "+1", "1"], "classification", ("-1", "1")),
        (["01", "02", "1", "1.0"], "classification", ("01", "02", "1")),
        (["1E5", "2e1", "3"], "classification", ("1E5", "2e1", "3")),
        (["1.50", "1.5", "beta"], "classification", ("1.5", "1.50", "beta")),
        (["12345678901234567890", "12345678901234567891.0"], "classification", None),
        ([True, False], "classification", ("0", "1")),
        (["1e-05", "0.5", "2"], "regression", ()),
        (["01", "0.5"], "regression", ()),
        ([["a"], ["b", "a"], []], "multi_label_classification", ("a", "b")),
        ([[3, 10], [9.0]], "multi_label_classification", ("3", "9", "10")),
    ],
)
def test_labels_that_look_like_numbers_and_lists(tmp_path, labels, kind, names):
    rows = [{"text": "a", "label": label} for label in labels * 12]
    made = load_task(DataConfig(source=dump(tmp_path / "n.jsonl", rows)))
    assert made.kind == kind
    assert made.labels == names or (names is None and len(made.labels) == len(labels))


@pytest.mark.parametrize(("train", "dev"), [("1\n0", "1.0\n0.0"), ("1.0\n0.0", "0\n1")])
def test_train_and_dev_may_write_a_class_in_two_ways(tmp_path, train, dev):
    paths = []
    for name, labels in {"a.csv": train, "b.csv": dev}.items():
        lines = "".join(f"t,{label}\n" for label in labels.split())
        paths.append(write(tmp_path / name, f"text,label\n{lines}"))
    made = load_task(DataConfig(source=paths[0], dev=paths[1]))
    assert made.labels == ("0", "1") and {row.label for row in made.dev} == {0, 1}


def test_lists_of_classes_are_indices_or_a_vector(tmp_path):
    for labels, wanted in (
        ([["b", "a", "b"], [], ["b"]], [(0, 1), (), (1,)]),
        ([[0, 0, 1], [1, 0, 1], [0, 1, 0]], [(2,), (0, 2), (1,)]),
    ):
        rows = [{"text": "t", "labels": label} for label in labels]
        path = dump(tmp_path / "m.jsonl", rows)
        made = load_task(DataConfig(source=path, dev=path))
        assert [row.label for row in made.train] == wanted and made.metric == "micro_f1"


def test_words_with_tags(tmp_path):
    rows = [{"text": "a b", "tokens": ["a", "b"], "ner_tags": ["O", "X"], "pos_tags": [1, 2]}]
    path = dump(tmp_path / "w.jsonl", rows)
    made = load_task(DataConfig(source=path, dev=path))
    assert (made.kind, made.labels, made.metric) == ("token_classification", ("O", "X"), "accuracy")
    assert made.train == (Example(("a", "b"), None, (0, 1)),)


def test_tags_of_a_whole_text_where_the_task_says_so(tmp_path):
    rows = [{"text": "a", "tags": tags} for tags in (["x", "y"], ["y"])]
    path = dump(tmp_path / "t.jsonl", rows)
    made = load_task(DataConfig(source=path, dev=path, task="multi_label_classification"))
    assert made.labels == ("x", "y") and [row.label for row in made.train] == [(0, 1), (1,)]


@pytest.mark.parametrize("ignored", [-100, -100.0])
def test_words_that_do_not_count_have_no_class(tmp_path, ignored):
    rows = [{"tokens": ["a", "b"], "ner_tags": [ignored, i % 2]} for i in range(2)]
    rows.append({"tokens": ["c"], "ner_tags": [ignored]})
    path = dump(tmp_path / "w.jsonl", rows)
    made = load_task(DataConfig(source=path, dev=path))
    assert made.labels == ("0", "1") and repr(made.dev[1].label) == "(-100, 1)"
    assert made.dev[2].label == (-100,)
    one = dump(tmp_path / "o.jsonl", rows[:1])
    with pytest.raises(ValueError, match=r"every row of train has the label .* nothing to learn"):
        load_task(DataConfig(source=one, dev=one))
    rows = [{"text": "a", "labels": [-100, i]} for i in range(2)]  # of a text it is a class
    path = dump(tmp_path / "m.jsonl", rows)
    assert load_task(DataConfig(source=path, dev=path)).labels == ("-100", "0", "1")


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def parts(*texts: str) -> list[dict[str, str | None]]:
    """Content as the hub's data sets hold it, with a place for what other parts have."""
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


PARTED = [{"role": "user", "content": parts("a")}, {"role": "assistant", "content": parts("", "b")}]


@pytest.mark.parametrize(
    ("row", "text", "pair"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, "a\n\nb", "c"),
        ({"instruction": "a", "input": "", "output": "c"}, "a", "c"),
        ({"instruction": "a", "input": None, "output": "c", "id": 3}, "a", "c"),
        ({"question": "a", "context": "b", "answer": "c"}, "a\n\nb", "c"),
        ({"input": "a", "output": "c"}, "a", "c"),
        ({"text": "a", "id": 3}, "a", None),
        ({"messages": turns("a", "b")}, tuple(turns("a", "b")), None),
        ({"prompt": turns("a", "b")[:1], "completion": turns("a", "b")[1:]}, None, None),
        ({"prompt": turns("a", "b")[:1], "completion": turns("a", "b")[1:], "id": 1}, None, None),
        ({"conversations": SHARED}, None, None),
        ({"messages": PARTED}, None, None),
    ],
)
def test_rows_to_learn_to_write(tmp_path, caplog, row, text, pair):
    path = dump(tmp_path / "m.jsonl", [row])
    made = load_task(DataConfig(source=path, dev=path))
    assert made.kind == "causal_lm" and not caplog.messages
    assert made.train[0] == Example(tuple(turns("a", "b")) if text is None else text, pair, None)


@pytest.mark.parametrize("name", ["context", "input"])
def test_a_conversation_has_no_context(tmp_path, caplog, name):
    """It has messages; a column beside it is named as one that is not used."""
    row = {"prompt": turns("a", "b")[:1], "completion": turns("a", "b")[1:], name: "c"}
    path = dump(tmp_path / "m.jsonl", [row])
    made = load_task(DataConfig(source=path, dev=path))
    assert made.train[0] == Example(tuple(turns("a", "b")), None, None)
    assert any(f"not used: {name}" in said for said in caplog.messages)
    wrong = dump(tmp_path / "w.jsonl", [row | {"completion": "b"}])
    with pytest.raises(ValueError, match="only one of prompt and completion is a list"):
        load_task(DataConfig(source=wrong, dev=wrong))


def test_a_json_file_is_one_list(tmp_path):
    rows = [{"instruction": f"a{i}", "output": "b"} for i in range(4)]
    path = write(tmp_path / "alpaca.json", json.dumps(rows, indent=2))
    assert load_task(DataConfig(source=path, dev=path)).dev[3] == Example("a3", "b", None)


def test_columns_of_any_case_and_those_that_are_left(tmp_path, caplog):
    lines = "".join(f"{i},t{i},good,{('pos', 'neg')[i % 2]}\n" for i in range(20))
    source = write(tmp_path / "k.csv", "Id,Review,Title,Sentiment\n" + lines)
    made = load_task(DataConfig(source=source))
    assert made.labels == ("neg", "pos") and made.train[0].text == "t0"
    (message,) = caplog.messages
    assert message.endswith("k.csv:2: classification from Review, Sentiment; not used: Title")


def test_the_held_out_part_keeps_the_class_shares(tmp_path):
    lines = "".join(f"t{i}\t{i % 4 == 0:d}\n" for i in range(80))
    made = load_task(DataConfig(source=write(tmp_path / "n.tsv", "text\tlabel\n" + lines)))
    assert Counter(row.label for row in made.dev) == {0: 6, 1: 2}
    assert not set(made.train) & set(made.dev) and len(made.train) == 72


def test_a_hub_data_set_brings_its_class_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    names, text = datasets.ClassLabel(names=["entailment", "not_entailment"]), "string"
    features = {f"sentence{i}": datasets.Value(text) for i in (1, 2)} | {"label": names}
    features = datasets.Features(features)
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"]}
    made = {
        split: datasets.Dataset.from_dict(columns | {"label": labels}, features=features)
        for split, labels in {"train": [0, 1], "validation": [1, 1], "test": [-1, -1]}.items()
    }
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: asked.append(a) or made)
    rte = load_task(DataConfig(source="glue/rte"))
    assert asked == [("nyu-mll/glue", "rte")]
    assert rte.labels == ("entailment", "not_entailment")
    assert rte.dev == (Example("a", "c", 1), Example("b", "d", 1))
    for dev, message in (
        ("test", r"glue/rte test\[0\]: the label -1 is not among the 2 classes"),
        ("extra", r"'extra' is not a split .* train, validation, test"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task(DataConfig(source="glue/rte", dev=dev))


def test_lists_of_a_hub_data_set_have_its_class_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    several = datasets.Sequence(datasets.ClassLabel(names=["O", "X"]))
    for text, column, label, expected in (
        ("string", "text", "labels", ("multi_label_classification", (1,))),
        (datasets.Value("string"), "tokens", "ner_tags", ("token_classification", (1, -100))),
    ):
        kind = datasets.Value(text) if isinstance(text, str) else datasets.Sequence(text)
        cells = ["a b", "c"] if isinstance(text, str) else [["a", "b"], ["c"]]
        features = datasets.Features({column: kind, label: several})
        labels = [[1, 1 if text == "string" else -100], [0]]
        made = datasets.Dataset.from_dict({column: cells, label: labels}, features=features)
        sets = {"train": made, "validation": made}
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, sets=sets: sets)
        task = load_task(DataConfig(source="somebody/rows"))
        assert task.labels == ("O", "X") and (task.kind, task.train[0].label) == expected


def test_the_hub_out_of_reach_is_said_plainly(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"'imdb' is not a file .* pip install datasets"):
        load_task(DataConfig(source="imdb"))
    monkeypatch.undo()
    datasets = pytest.importorskip("datasets")

    def offline(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"'imdb' is not a file .*\(ConnectionError: no network\)"):
        load_task(DataConfig(source="imdb"))
    with pytest.raises(ValueError, match="'glue/foo' is not a GLUE task: choose one of cola, sst2"):
        load_task(DataConfig(source="glue/foo"))


COUNTS, SEES = (
    json.dumps({"messages": [*turns("a"), {"role": "assistant", "content": content}]})
    for content in (3, [{"type": "image"}])
)
MIXED_CHAT = '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}'
HALF, WORD = "text,label\na,1\nb,.5\n", "text,label\na,1\nb,x\n"


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("e.tsv", "", {}, "e.tsv is empty"),
        ("e.csv", "text,label\n", {}, "e.csv is empty"),
        ("e.jsonl", "\n", {}, "e.jsonl is empty"),
        ("r.tsv", "text\tlabel\na\t1\nb\n", {}, r"r.tsv:3 has 1 cells, .* 2 \(text, label\)"),
        ("r.csv", "text,label\na,1,2\n", {}, "r.csv:2 has 3 cells"),
        ("q.csv", 'text,label\n"a,1\n', {}, "broken CSV"),
        ("h.csv", "text,text\na,b\n", {}, "names a column twice"),
        ("h.csv", 'text;label\n"a";1\n', {}, "h.csv is the one column 'text;label'.*by ';'"),
        ("h.csv", "sep=;\ntext;label\na;1\n", {}, "its cells are separated by ';'"),
        ("h.csv", "text\tlabel\na\t1\n", {}, r"its cells are separated by '\\t'"),
        ("h.tsv", "text,label\na,1\n", {}, "its cells are separated by ','; write it with commas"),
        ("j.jsonl", '{"text": "a", "label": 1}\n{"text": \n', {}, "j.jsonl:2 is broken JSON"),
        ("o.jsonl", "[1]\n", {}, r"o.jsonl:1 is '\[1\]': each line must be a JSON object"),
        (
            "j.json",
            '{"text": "a"}\n{"text": "b"}',
            {},
            "j.json is broken JSON .* name it .jsonl if",
        ),
        ("j.json", '{"text": "a"}', {}, "j.json must be one list of JSON objects, not "),
        ("j.json", '[{"text": "a"}, 3]', {}, "j.json must be one list of JSON objects, not '3'"),
        ("j.json", "[]", {}, "j.json is empty"),
        ("x.parquet", "a", {}, "unknown extension '.parquet': use .csv, .tsv, .jsonl"),
        ("m.csv", "text,y\na,1\n", {}, "no label column: .*m.csv:2 has the columns text, y"),
        ("m.csv", "body,label\na,1\n", {}, "no text column: .*the columns body, label"),
        ("m.csv", "text,label\na,1\n", {"text": "b"}, "data.text='b' is not a column: .*text, l"),
        ("m.csv", "text,label\na,1\n", {"label": "y"}, "data.label='y' is not a column"),
        ("m.csv", "text,label\na,1\n", {"label": "text"}, "no text column"),
        ("m.csv", "text,label\na,1\n", {"text": "label"}, r"used twice \(label, label\)"),
        ("m.csv", "text,y\na,b\n", {"task": "causal_lm", "label": "y"}, "causal_lm has no label"),
        ("f.csv", HALF, {"task": "classification"}, "f.csv:3: .*'.5' is not a c"),
        ("w.csv", WORD, {"task": "regression"}, "w.csv:3: .*'x' is not a number, "),
        ("c.csv", "text,label\na,1\nb,1\n", {}, "every row of train has the label 1"),
        ("n.csv", "text,label\na,1\nb,nan\n", {}, "'nan' is not a number or a word"),
        ("n.csv", "text,label\na,1\nb,\n", {}, "n.csv:3: the label '' is not a number or a word"),
        ("n.csv", "text,label\na,1\nb,1e999\n", {}, "n.csv:3: the label '1e999' is not a number"),
        ("n.jsonl", '{"text": "a", "label": NaN}', {}, "n.jsonl:1: the label nan is not"),
        ("n.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', {}, "jsonl:2: the label None is"),
        ("n.jsonl", '{"text": "a", "label": {}}', {}, r"{} is not a number or a word"),
        ("l.jsonl", '{"text": "a", "label": [1]}', {}, r"every row of train has the label \[1\]"),
        (
            "l.jsonl",
            '{"text": "a", "label": [1]}\n{"text": "b", "label": 2}',
            {},
            "2 is not a list",
        ),
        ("l.jsonl", '{"text": "a", "label": [null]}', {}, "l.jsonl:1: the label None is not a num"),
        ("k.jsonl", '{"tokens": ["a"], "tags": ["O", "X"]}', {}, "k.jsonl:1 has 1 words and 2 la"),
        ("k.jsonl", '{"tokens": [], "ner_tags": []}', {}, "'tokens' is .*not a list of words"),
        ("k.jsonl", '{"text": "a b", "Tags": ["X"]}', {}, "k.jsonl:1: 'text' is 'a b', not a list"),
        ("k.csv", 'text,ner_tags\na b,"[0, 1]"', {}, "'a b', not .*=multi_label_classification"),
        ("e.csv", "text,label\n,1\n ,2\n", {}, "every 'text' of train is empty"),
        ("c.jsonl", '{"messages": [{"rol": "user"}]}', {}, "not a list of messages with role and"),
        ("c.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', {}, "no assistant's turn"),
        ("c.jsonl", COUNTS, {}, r"content as text \(see {'role': 'assistant', 'content': 3}\)"),
        ("c.jsonl", SEES, {}, r"content as text \(see .*\[{'type': 'image'}\]}\): fill it or"),
        ("c.jsonl", MIXED_CHAT, {}, "only one of prompt and completion is a list"),
        ("t.jsonl", '{"text": 3, "label": 1}', {}, "t.jsonl:1: 'text' is 3, not text"),
        ("s.csv", "text,label\na,1\nb,2\n", {}, "2 rows are too few to hold out"),
    ],
)
def test_bad_tables_are_refused_by_name(tmp_path, name, text, options, message):
    with pytest.raises(ValueError, match=message):
        load_task(DataConfig(source=write(tmp_path / name, text), **options))


def test_unreadable_and_missing_files_are_refused_by_name(tmp_path):
    def refuses(kind, message, source, dev=None):
        with pytest.raises(kind, match=message):
            load_task(DataConfig(source=str(source), dev=dev))

    latin, cut, folder = (tmp_path / name for name in ("latin.csv", "cut.tsv.gz", "folder"))
    latin.write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    refuses(ValueError, r"latin.csv is not UTF-8 .*byte 0xe9 in position 14", latin)
    cut.write_bytes(gzip.compress(b"text\tlabel\n" * 99)[:-9])
    refuses(ValueError, r"cut.tsv.gz is not a whole gzip file", cut)
    refuses(FileNotFoundError, r"no\.csv' does not exist", tmp_path / "no.csv")
    folder.mkdir()
    refuses(FileNotFoundError, r"has no train file: add train.csv", folder)
    train = write(folder / "train.csv", "text,label\na,1\nb,2\n")
    refuses(FileNotFoundError, r"gone.csv is not a file", train, str(tmp_path / "gone.csv"))
    dev = write(tmp_path / "d.csv", "text,label\nc,3\n")
    refuses(ValueError, r"d.csv:2: the label 3 is not among the 2 classes .*\(1, 2\)", train, dev)
    other = write(tmp_path / "o.csv", "body,label\nc,1\n")
    refuses(ValueError, r"data.text='text' is not .*o.csv:2 has .* body", train, other)
    write(folder / "train.tsv", "text\tlabel\n")
    refuses(ValueError, r"more than one train file \(train.csv, train.tsv\)", folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ner"}, "data.task='ner': choose auto, classification"),
        ({"source": ""}, "data.source=''"),
        ({"dev_ratio": 1.0}, "data.dev_ratio=1.0: choose a number between 0 and 1"),
        ({"max_length": 2}, "data.max_length=2: choose a whole number from 8 up"),
        ({"max_train": "many"}, "data.max_train='many'"),
        ({"max_dev": 0}, "data.max_dev=0"),
        ({"task": "regression"}, "leave data.task out"),
        ({"label": "y", "text": "t"}, "leave data.text, data.label out"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        load_task(DataConfig(**options))
