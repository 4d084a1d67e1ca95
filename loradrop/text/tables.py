"""Rows from CSV, TSV, JSON-lines and JSON files, from folders of them, and from hub data sets.

Files are read with Python's own modules: so a plain install reads them, and an error names a line.
"""

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".json")
DEV_NAMES = ("dev", "validation", "validation_matched", "valid", "val", "eval", "test")
Record = tuple[int, dict[str, Any]]  # a line's or item's number, and the row in it
_log = logging.getLogger(__name__)
GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")


class Table(NamedTuple):
    """Rows as read; `places` says where each stands, `classes` what a hub's integers mean."""

    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    places: Sequence[str]
    classes: Mapping[str, tuple[str, ...]]


def _stem(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".gz"))


def _text(path: Path) -> str:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}): fetch it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it to UTF-8") from error


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    usual = csv.field_size_limit(max(len(text), 1))  # a cell may be as long as the file
    try:
        for cells in filter(None, reader):
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(
            f"{path}:{reader.line_num}: broken CSV ({error}): quote cells with commas, quotes or "
            "line breaks, and double the quotes inside"
        ) from error
    finally:
        csv.field_size_limit(usual)


def _tsv_records(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.removesuffix("\r"):
            yield number, line.split("\t")


def _rows(path: Path, records: Iterator[tuple[int, list[str]]]) -> Iterator[Record]:
    """The records below the header as rows."""
    header = [name.strip() for name in next(records, (0, []))[1]]
    other = [mark for mark in (";", "\t", ",", "|") if len(header) == 1 and mark in header[0]]
    if other:
        raise ValueError(
            f"the header of {path} is the one column {header[0]!r}: its cells are separated by "
            f"{other[0]!r}; write it with commas (.csv) or tabs (.tsv)"
        )
    if len(set(header)) < len(header):
        raise ValueError(f"{path} names a column twice in its header ({', '.join(header)})")
    for number, cells in records:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}:{number} has {len(cells)} cells, its header {len(header)} "
                f"({', '.join(header)}): repair or remove the row"
            )
        yield number, dict(zip(header, cells, strict=True))


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is broken JSON ({error}): repair it") from error
        if isinstance(row, dict):
            yield number, row
        elif line.strip():
            raise ValueError(f"{path}:{number} is {line[:40]!r}: each line must be a JSON object")


def _json_list(path: Path, text: str) -> Iterator[Record]:
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = "repair it, or name it .jsonl if each line is a JSON object"
        raise ValueError(f"{path} is broken JSON ({error}): {hint}") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        if not isinstance(rows, list) or not isinstance(row, dict):
            raise ValueError(f"{path} must be one list of JSON objects, not {str(row)[:40]!r}")
        yield number, row


def read_table(path: Path) -> Table:
    """The rows of one file. CSV has quotes, TSV never; both have one header line. JSON is a list.

    Raises FileNotFoundError, or ValueError with the line for what cannot be read.
    """
    extension = _stem(path).suffix.lower()
    if extension not in EXTENSIONS:
        known = ", ".join(EXTENSIONS)
        raise ValueError(f"{path} has the unknown extension {extension!r}: use {known} (+ .gz)")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: check data.source and data.dev")
    text = _text(path)
    if extension in (".jsonl", ".json"):
        records = list((_json_lines if extension == ".jsonl" else _json_list)(path, text))
    else:
        cells = _csv_records(path, text) if extension == ".csv" else _tsv_records(text)
        records = list(_rows(path, cells))
    if not records:
        raise ValueError(f"{path} is empty: it needs at least a row (and a header in CSV and TSV)")
    rows = [row for _, row in records]
    columns = dict.fromkeys(column for row in rows for column in row)
    return Table(tuple(columns), rows, [f"{path}:{line}" for line, _ in records], {})


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    for name in names:
        files = [folder / f"{name}{end}{gz}" for end in EXTENSIONS for gz in ("", ".gz")]
        found = [file for file in files if file.is_file()]
        if len(found) > 1:
            listed = ", ".join(file.name for file in found)
            raise ValueError(f"{folder} has more than one {name} file ({listed}): keep one of them")
        if found:
            return found[0]
    return None


def _hub(source: str, dev: str | None) -> tuple[str, Table, Table | None]:
    name, _, subset = source.partition(":")
    if source.startswith("glue/"):
        name, subset = "nyu-mll/glue", source.removeprefix("glue/")
        if subset not in GLUE:
            known = ", ".join(GLUE)
            raise ValueError(f"data.source={source!r} is not a GLUE task: choose one of {known}")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data.source={source!r} is not a file or folder here, and data sets of the hub need "
            "the package datasets: pip install datasets, or name a file"
        ) from error
    try:
        splits = datasets.load_dataset(name, subset or None)
    except Exception as error:
        raise ValueError(
            f"data.source={source!r} is not a file or folder here, and the hub gave no data set of "
            f"this id ({type(error).__name__}: {error}): check the id (id:subset where there are "
            "subsets) and the network, or use a file or data.source=stdlib"
        ) from error
    if "train" not in splits:
        raise ValueError(f"data.source={source!r} has no train split, only {', '.join(splits)}")
    if dev is not None and dev not in splits:
        known = ", ".join(splits)
        raise ValueError(f"data.dev={dev!r} is not a split of {source}: it has {known}")

    def table(split: str) -> Table:
        rows = splits[split]
        inner = {key: getattr(f, "feature", f) for key, f in rows.features.items()}  # of a list
        named = {key: getattr(feature, "names", None) for key, feature in inner.items()}
        classes = {key: tuple(names) for key, names in named.items() if names}
        places = [f"{source} {split}[{i}]" for i in range(len(rows))]
        return Table(tuple(rows.column_names), list(rows), places, classes)

    chosen = dev or next((split for split in DEV_NAMES if split in splits), None)
    train, other = table("train"), table(chosen) if chosen else None
    return source, train, other if dev else _as_dev(chosen or "", train, other)


def read_source(source: str, dev: str | None = None) -> tuple[str, Table, Table | None]:
    """(name, train, dev) of a folder, a file, a GLUE task (`glue/rte`) or a hub id.

    A folder holds train.<ext>[.gz] and perhaps a dev, validation, valid, val, eval or test file,
    which also counts beside a single file train.<ext>. Hub ids may carry a subset (`id:subset`); a
    file or folder of the same name goes first. `dev` names a file, or a split of a hub data set;
    without any, and where a test set without labels was found, dev is None.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if (found := _find(path, ["train"])) is None:
            raise FileNotFoundError(
                f"the folder {path} has no train file: add train{', train'.join(EXTENSIONS)} (or "
                "with .gz), or set data.source to a file"
            )
        path = found
    elif not path.is_file():
        if _stem(path).suffix.lower() in EXTENSIONS or source.startswith((".", "/", "~")):
            raise FileNotFoundError(f"data.source={source!r} does not exist: check the path")
        return _hub(source, dev)
    name, beside = _stem(path).stem, None
    if name == "train":
        name, beside = path.parent.resolve().name, _find(path.parent, DEV_NAMES)
    file = beside if dev is None else Path(dev).expanduser()
    train, other = read_table(path), None if file is None else read_table(file)
    return name, train, other if file is None or dev else _as_dev(file.name, train, other)


def _as_dev(name: str, train: Table, found: Table | None) -> Table | None:
    """What was found beside train, if it can be dev: a test set often has no labels."""
    if found is None:
        return None
    lacks = [column for column in train.columns if column not in found.columns]
    if lacks and name.startswith("test"):
        _log.warning("%s lacks %s: it is not taken as dev", name, ", ".join(lacks))
        return None
    if name.startswith("test"):
        told = "dev is %s: what is chosen by it, as the best model, is not tested by it any more"
        _log.warning(told, name)
    return found
