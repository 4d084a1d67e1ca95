"""Tokens, batches and metrics: exact ids, what is learned and what is padding, and each refusal."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loradrop.text.examples import Example, TextTask
from loradrop.text.metrics import metric_fn
from loradrop.text.task import DataConfig, load_task
from loradrop.text.tokens import collator, tokenize

WORDS = ["[PAD]", "[CLS]", "[SEP]", "<eos>", "[UNK]", "a", "b", "c", "d", "e"]


@pytest.fixture
def encoder():
    """[CLS] x [SEP] y [SEP] over the words a to e, which have the ids 5 to 9."""
    special = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]"}
    return make("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", **special)


@pytest.fixture
def decoder():
    """The same words and no special token but the end, which nothing adds by itself."""
    return make("$A", "$A $B:1", eos="<eos>")


def make(single, pair, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    options = {f"{name}_token": token for name, token in special.items()}
    options["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    options |= {"unk_token": "[UNK]", "model_max_length": 32}
    return PreTrainedTokenizerFast(tokenizer_object=made, **options)


def task(kind, train, dev=(), metric="accuracy") -> TextTask:
    rows = [tuple(Example(*row) for row in rows) for rows in (train, dev)]
    return TextTask("made", kind, ("x", "y"), *rows, metric, {})


def test_sentences_and_pairs_become_ids(encoder):
    train, dev = tokenize(task("classification", [("a b", None, 1)], [("c", None, 0)]), encoder, 8)
    assert train[0]["input_ids"] == [1, 5, 6, 2] and train[0]["labels"] == 1
    assert (len(train), len(dev), dev[0]["input_ids"]) == (1, 1, [1, 7, 2])
    pairs, _ = tokenize(task("classification", [("a b", "c", 1)]), encoder, 8)
    assert pairs[0] == {
        "input_ids": [1, 5, 6, 2, 7, 2],
        "token_type_ids": [0, 0, 0, 0, 1, 1],
        "attention_mask": [1] * 6,
        "labels": 1,
    }
    long, _ = tokenize(task("classification", [("a " * 20, "b", 0)]), encoder, 8)
    assert long[0]["input_ids"] == [1, 5, 5, 5, 5, 2, 6, 2]


def test_classes_and_numbers_are_padded_to_the_longest(encoder):
    rows, _ = tokenize(task("classification", [("a", None, 1), ("a b c", None, 0)]), encoder, 8)
    batch = collator("classification", encoder)([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[1, 5, 2, 0, 0], [1, 5, 6, 7, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [1, 0]
    numbers = task("regression", [("a", None, 0.5), ("b", None, 2.0)], metric="pearson")
    rows, _ = tokenize(numbers, encoder, 8)
    labels = collator(numbers, encoder)([rows[0], rows[1]])["labels"]
    assert labels.dtype == torch.float32 and labels.tolist() == [0.5, 2.0]


def test_a_completion_is_learned_with_its_end_and_its_prompt_is_not(decoder):
    made = task("causal_lm", [("a b", "c d", None), ("a b c ", "d", None)], metric="loss")
    rows, _ = tokenize(made, decoder, 8)
    assert rows[0]["input_ids"] == [5, 6, 7, 8, 3] and rows[0]["labels"] == [-100, -100, 7, 8, 3]
    batch = collator(made, decoder)(
        [rows[0], {"input_ids": [5, 8], "attention_mask": [1, 1], "labels": [5, 8]}]
    )
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 3], [5, 8, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["input_ids"][1].tolist() == [5, 8, 3, 3, 3]
    assert decoder.pad_token is None


def test_text_alone_is_learned_whole_and_no_separator_parts_a_pair(decoder, encoder):
    for text, ids in (("a b c", [5, 6, 7, 3]), ("a " * 20, [5] * 8)):
        rows, _ = tokenize(task("causal_lm", [(text, None, None)]), decoder, 8)
        assert rows[0]["input_ids"] == rows[0]["labels"] == ids
    rows, _ = tokenize(task("causal_lm", [("a", "b", None)]), encoder, 8)
    assert rows[0]["input_ids"] == [1, 5, 6] and rows[0]["labels"] == [-100, -100, 6]


def test_a_line_break_joins_only_where_there_is_no_space():
    seen = []

    def spy(texts, **_):
        seen.append(texts)
        return {"input_ids": [[5, 6]] * len(texts)}

    spy.model_max_length, spy.eos_token_id, spy.sep_token_id = 32, 3, None
    rows = [("q", "a", None), ("q ", "a", None), ("q", " a", None), ("", "a", None)]
    tokenize(task("causal_lm", rows, rows[:1]), spy, 8)
    assert seen[0] == ["q\n", "q ", "q", "\n"] and seen[1] == ["a", "a", " a", "a"]


def chat(*turns):
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))


TURN = "{% for m in messages %}{{ ' d ' if m.role == 'user' else ' e ' }}"
PLAIN = TURN + "{{ m.content }} <eos>{% endfor %}{% if add_generation_prompt %} e{% endif %}"
MARKED = TURN + (
    "{% if m.role == 'user' %}{{ m.content }} <eos>{% else %}"
    "{% generation %}{{ m.content }} <eos>{% endgeneration %}{% endif %}{% endfor %}"
)
THINKS = TURN + (  # only in the last turn; the prompt for an answer opens what an answer lacks
    "{{ 'b ' if loop.last and m.role != 'user' }}{{ m.content }} <eos>{% endfor %}"
    "{% if add_generation_prompt %} e [UNK]{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "turns", "ids", "learned"),
    [
        (PLAIN, ("a", "b c"), [8, 5, 3, 9, 6, 7, 3], [4, 5, 6]),
        (PLAIN, ("a", "b", "c", "d"), [8, 5, 3, 9, 6, 3, 8, 7, 3, 9, 8, 3], [4, 5, 10, 11]),
        (MARKED, ("a", "b", "c", "d"), [8, 5, 3, 9, 6, 3, 8, 7, 3, 9, 8, 3], [4, 5, 10, 11]),
        (THINKS, ("a", "c", "c", "d"), [8, 5, 3, 9, 7, 3, 8, 7, 3, 9, 6, 8, 3], [4, 5, 10, 11, 12]),
    ],
)
def test_the_turns_of_the_assistant_are_learned(decoder, template, turns, ids, learned):
    decoder.chat_template = template
    made = task("causal_lm", [(chat(*turns), None, None)], metric="loss")
    row = tokenize(made, decoder, 16)[0][0]
    assert row["input_ids"] == ids and row["attention_mask"] == [1] * len(ids)
    assert row["labels"] == [t if i in learned else -100 for i, t in enumerate(ids)]


def test_conversations_that_cannot_be_tokens_are_refused(decoder):
    made = task("causal_lm", [(chat("a " * 9, "b"), None, None)])
    with pytest.raises(ValueError, match="the tokenizer has no chat template: choose a model"):
        tokenize(made, decoder)
    decoder.chat_template = "{{ raise_exception('roles alternate') }}"
    with pytest.raises(ValueError, match=r"template refuses .*\(roles alternate\): repair"):
        tokenize(made, decoder)
    decoder.chat_template = "{{ 1 + messages[0].content }}"  # no error of the template's own
    with pytest.raises(ValueError, match=r"template refuses .*unsupported operand .*: repair"):
        tokenize(made, decoder)
    decoder.chat_template = PLAIN
    with pytest.raises(ValueError, match="1 of 1 rows have nothing to learn"):
        tokenize(made, decoder, 8)


def test_a_word_has_its_label_at_its_first_token(encoder):
    from tokenizers import models

    pieces = {**{word: i for i, word in enumerate(WORDS)}, "##b": 10, "##c": 11}
    encoder.backend_tokenizer.model = models.WordPiece(pieces, unk_token="[UNK]")
    rows = [(("abc", "a", "ab"), None, (1, 0, 1)), (("a",), None, (0,))]
    train, _ = tokenize(task("token_classification", rows), encoder)
    assert train[0]["input_ids"] == [1, 5, 10, 11, 5, 5, 10, 2]
    assert train[0]["labels"] == [-100, 1, -100, -100, 0, 1, -100, -100]
    batch = collator("token_classification", encoder)([train[0], train[1]])
    assert batch["labels"][1].tolist() == [-100, 0] + [-100] * 6


def test_rows_in_which_no_word_counts_are_left_out(encoder, caplog):
    """A batch of them would have a loss of NaN."""
    rows = [(("a", "b"), None, (-100, 1)), (("a",), None, (-100,)), (("d",) * 8, None, (0,) * 8)]
    train, _ = tokenize(task("token_classification", rows), encoder, 8)
    assert [row["labels"] for row in train] == [[-100, -100, 1, -100], [-100, *[0] * 6, -100]]
    assert "1 of 3 rows have no token to learn" in caplog.text
    with pytest.raises(ValueError, match="no row has a token to learn"):
        tokenize(task("token_classification", rows[1:2]), encoder, 8)


def test_classes_that_apply_become_a_vector(encoder):
    rows = [("a", None, (1,)), ("b c", None, ()), ("c", None, (0, 1))]
    train, _ = tokenize(task("multi_label_classification", rows), encoder)
    labels = collator("multi_label_classification", encoder)(list(train))["labels"]
    assert labels.dtype == torch.float32 and labels.tolist() == [[0, 1], [0, 0], [1, 1]]


def limits(positions=None, reserved=None, size=10, known=None):
    """A model of `positions` rows, of which the first `reserved` + 1 are not for tokens."""
    model = torch.nn.Module()
    model.position_embeddings = positions and torch.nn.Embedding(positions, 2, reserved)
    model.get_input_embeddings = lambda: torch.nn.Embedding(size, 2)
    model.config = SimpleNamespace(get_text_config=lambda: model.config)
    model.config.max_position_embeddings = known or positions
    return model


def test_the_length_is_that_of_the_data_within_what_the_model_takes(encoder, caplog):
    made = task("classification", [("a " * n, None, 0) for n in (2, 9, 20)])

    def lengths(*options):
        return [len(row["input_ids"]) for row in tokenize(made, encoder, *options)[0]]

    assert lengths() == lengths(None, limits(30)) == [4, 11, 22] and not caplog.messages
    assert lengths(None, limits(20)) == lengths(20) == lengths(20, limits(known=16)) == [4, 11, 20]
    (message,) = [text for text in caplog.messages if "cut" not in text]
    assert message == "data.max_length=20 is beyond the 16 positions that the model was made for"
    assert lengths(None, limits(20, 1)) == [4, 11, 18]
    assert lengths(None, limits(known=-1)) == [4, 11, 22]  # XLNet's: no limit
    assert lengths(None, limits(known=10)) == [4, 10, 10]
    assert caplog.messages[-1] == "2 of 3 rows are cut at 10 tokens (the longest has 22)"
    for max_length, model, taken in ((20, limits(20, 1), 18), (33, limits(), 32), (33, None, 32)):
        with pytest.raises(ValueError, match=rf"={max_length} is more than the {taken} tokens th"):
            tokenize(made, encoder, max_length, model)


def test_a_token_without_an_embedding_is_refused(encoder):
    with pytest.raises(ValueError, match=r"gives 'e' the id 9, and the model has only 9 embedd"):
        tokenize(task("classification", [("a e", None, 0)]), encoder, 8, limits(size=9))
    tokenize(task("classification", [("a d", None, 0)]), encoder, 8, limits(size=9))


def test_what_cannot_be_tokens_or_batches_is_refused(encoder, decoder):
    with pytest.raises(ValueError, match=r"data.max_length=64 is more than the 32 tokens"):
        tokenize(task("classification", [("a", None, 0)]), encoder, 64)
    long = task("causal_lm", [("a " * 9, "b", None), ("a " * 20, "b", None), ("a", "b", None)])
    with pytest.raises(ValueError, match=r"2 of 3 rows have nothing to learn.*=8 .* has 20 tokens"):
        tokenize(long, decoder, 8)
    with pytest.raises(ValueError, match="no task 'ner': choose classification"):
        collator("ner", encoder)
    with pytest.raises(ValueError, match=r"no pad token: set tokenizer.pad_token"):
        collator("classification", decoder)


def score(metric, logits, labels):
    from transformers import EvalPrediction

    kind = "regression" if metric == "pearson" else "classification"
    compute = pickle.loads(pickle.dumps(metric_fn(task(kind, [], metric=metric))))
    return compute(EvalPrediction(predictions=logits, label_ids=np.array(labels)))


def test_metrics_by_definition():
    guess = np.array([1, 1, 1, 0, 0, 1, 0, 1])
    truth = [1, 1, 0, 0, 1, 1, 0, 1]
    logits = np.eye(2)[guess]
    assert score("accuracy", logits, truth) == {"accuracy": 0.75}
    tp, tn, fp, fn = 4, 2, 1, 1
    expected = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score("matthews", logits, truth)["matthews"] == pytest.approx(expected, rel=1e-12)
    values = np.array([[0.1], [0.9], [0.4], [0.2]], dtype=np.float32)
    numbers = [1.0, 2.0, 3.0, 0.0]
    expected = np.corrcoef(values[:, 0], numbers)[0, 1]
    assert score("pearson", values, numbers)["pearson"] == pytest.approx(expected, rel=1e-6)
    assert metric_fn(task("causal_lm", [], metric="loss")) is None


def test_metrics_at_their_ends():
    three = np.eye(3)[[0, 1, 2, 1]]
    assert score("matthews", three, [0, 1, 2, 1]) == {"matthews": 1.0}
    assert score("matthews", np.eye(2)[[1, 1]], [0, 1]) == {"matthews": 0.0}
    assert score("pearson", np.ones((3, 1)), [1.0, 2.0, 3.0]) == {"pearson": 0.0}
    tokens = np.array([[0, 1, -100], [2, 0, -100]])
    assert score("accuracy", np.eye(3)[[[0, 1, 1], [2, 2, 2]]], tokens) == {"accuracy": 0.75}
    several = np.array([[1.0, -1, 2], [-1, -1, 3]])
    assert score("micro_f1", several, [[1.0, 1, 0], [0, 0, 1]])["micro_f1"] == 2 * 2 / (3 + 3)
    assert score("micro_f1", -abs(several), [[0.0] * 3] * 2) == {"micro_f1": 0.0}
    hidden = (three, np.zeros(3))
    assert score("accuracy", hidden, [0, 1, 2, 0]) == {"accuracy": 0.75}


def test_a_file_becomes_a_batch_of_minilm(minilm_path, tmp_path):
    from transformers import AutoTokenizer

    lines = "".join(f"sentence number {i}\tand its pair\t{i % 2}\n" for i in range(20))
    (tmp_path / "p.tsv").write_text("sentence1\tsentence2\tlabel\n" + lines)
    made = load_task(DataConfig(source=str(tmp_path / "p.tsv"), max_length=16))
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    train, dev = tokenize(made, tokenizer, 16)
    batch = collator(made, tokenizer)([train[0], train[1]])
    assert tokenizer.decode(train[0]["input_ids"]).startswith("[CLS] sentence number")
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (2, 9)
    assert (len(train), len(dev)) == (18, 2)
