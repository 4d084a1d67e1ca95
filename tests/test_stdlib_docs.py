"""The embedded data: bounds for every Python, its split by modules, and how it is read."""

from collections import Counter
from pathlib import Path

import pytest

from loradrop.text.stdlib_docs import areas, read_docs
from loradrop.text.task import DataConfig, load_task


@pytest.fixture(scope="module")
def docs():
    return read_docs()


@pytest.fixture(scope="module")
def stdlib(docs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loradrop.text.task.read_docs", lambda: docs)
        return load_task(DataConfig())


def test_stdlib_is_large_unique_and_spread_over_areas(stdlib):
    rows = [*stdlib.train, *stdlib.dev]
    counts = Counter(row.label for row in rows)
    assert len(rows) >= 3000 and len({row.text for row in rows}) == len(rows)
    assert stdlib.labels == tuple(areas()) and len(stdlib.labels) >= 10
    assert set(counts) == set(range(len(areas())))
    assert max(counts.values()) < 0.2 * len(rows) and min(counts.values()) >= 100
    assert (stdlib.kind, stdlib.metric, stdlib.name) == ("classification", "accuracy", "stdlib")
    # dev is a fifth of every area
    train, dev = (Counter(row.label for row in rows) for rows in (stdlib.train, stdlib.dev))
    assert 0.2 <= len(stdlib.dev) / len(stdlib.train + stdlib.dev) <= 0.25
    for label, name in enumerate(stdlib.labels):
        assert 0.15 <= dev[label] / (train[label] + dev[label]) <= 0.32, name


def test_texts_are_normalised_prose_and_no_module_has_two_places(docs):
    places: dict[str, set[tuple[str, str]]] = {}
    for doc in docs:
        places.setdefault(doc.module, set()).add((doc.area, doc.split))
    assert all(len(found) == 1 for found in places.values())
    sides = [side for area in areas().values() for side in area.values()]
    listed = " ".join(sides).split()
    assert len(listed) == len(set(listed))
    for doc in docs:
        assert doc.text == " ".join(doc.text.split())
        assert len(doc.text) >= 20 and len(doc.text.split()) >= 4
        assert not doc.text.startswith(">>>")
    assert "Read from and write to tar format archives." in {doc.text for doc in docs}


def fill(stdlib: Path) -> None:
    """A standard library in which every module has 60 texts, and fails where it is imported."""
    for sides in areas().values():
        for module in " ".join(sides.values()).split():
            texts = [f"def f{i}():\n    'Text {i} of {module}, one of many.'" for i in range(60)]
            (stdlib / f"{module}.py").write_text("\n".join(["raise SystemExit", *texts]))


def test_sources_are_parsed_and_not_imported(tmp_path):
    fill(tmp_path)
    rows = read_docs(tmp_path)
    first = "Text 0 of tarfile, one of many."
    assert rows[0] == (first, "archives and storage", "tarfile", "train")
    sides = [side for area in areas().values() for side in area.values()]
    assert len(rows) == 60 * len(" ".join(sides).split())


def test_repeated_texts_count_once_and_ambiguous_ones_never(tmp_path):
    fill(tmp_path)
    with (tmp_path / "mailbox.py").open("a") as file:
        for text in ("Text 3 of email, one of many.", "Text 4 of zipapp, one of many."):
            file.write(f"\nclass C:\n    '{text}'")
    modules = {doc.text: doc.module for doc in read_docs(tmp_path)}
    assert modules["Text 3 of email, one of many."] == "email"
    assert "Text 4 of zipapp, one of many." not in modules


def test_leading_paragraphs_stop_where_it_is_enough_and_at_examples(tmp_path):
    fill(tmp_path)
    paragraphs = ["Short  first\n    line here.", "b " * 99, "c c", ">>> d", "e"]
    docstring = "\n\n    ".join(paragraphs)
    (tmp_path / "heapq.py").write_text(f'def f():\n    """{docstring}"""')
    module = '"""One two three four words.\n\n    >>> 1\n\n    Not this."""'
    (tmp_path / "graphlib.py").write_text(module)
    texts = {doc.module: doc.text for doc in read_docs(tmp_path)}
    assert texts["heapq"] == "Short first line here. " + " ".join("b" * 99)
    assert texts["graphlib"] == "One two three four words."


def test_packages_are_read_whole_but_for_their_tests(tmp_path):
    fill(tmp_path)
    for place in ("xml/dom", "xml/test"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "m.py").write_text(f'"""Words that stand in {place}."""')
    texts = {doc.text for doc in read_docs(tmp_path) if doc.module == "xml"}
    assert texts == {"Words that stand in xml/dom."}


def test_a_stripped_standard_library_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"only 0 usable docstrings .* set data\.source"):
        read_docs(tmp_path)
    fill(tmp_path)
    (tmp_path / "mailbox.py").unlink()
    with pytest.raises(ValueError, match="in 25 of 26 parts"):
        read_docs(tmp_path)


def test_draws_are_of_the_whole_and_by_their_seed(stdlib, docs, monkeypatch):
    monkeypatch.setattr("loradrop.text.task.read_docs", lambda: docs)
    small = DataConfig(max_train=130, max_dev=40, seed=3)
    first, second = load_task(small), load_task(small)
    assert first == second and first.fingerprint == second.fingerprint
    assert (len(first.train), len(first.dev)) == (130, 40)
    assert set(first.train) < set(stdlib.train) and set(first.dev) < set(stdlib.dev)
    assert len({row.label for row in first.train}) == len(areas())
    other = load_task(DataConfig(max_train=130, seed=4))
    assert first.fingerprint["train"] != other.fingerprint["train"]
    assert other.fingerprint["dev"] == stdlib.fingerprint["dev"]
