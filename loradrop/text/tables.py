"""Rows from CSV, TSV and JSON-lines files, from folders of them, and from data sets of the hub."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EXTENSIONS = (".csv", ".tsv", ".jsonl")
DEV_NAMES = ("dev", "validation", "valid", "test")
DEV_SPLITS = ("validation", "validation_matched", "dev", "valid", "test")
GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")


class Table(NamedTuple):
    """Rows as read; ``places`` says where each stands, ``classes`` what a hub's integers mean."""

    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    places: Sequence[str]
    classes: Mapping[str, tuple[str, ...]]


class Source(NamedTuple):
    """``dev`` is None where it has to be held out of ``train``."""

    name: str
    train: Table
    dev: Table | None


def _extension(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file ({error}): fetch it again") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {raw[error.start]:#04x} at offset {error.start}): "
            "convert it to UTF-8"
        ) from error


def _csv_records(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(
            f"{path}:{reader.line_num}: broken CSV ({error}): quote cells with commas, quotes or "
            "line breaks, and double the quotes inside"
        ) from error


def _tsv_records(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        yield number, line.split("\t") if line else []


def _grid(path: Path, records: Iterator[tuple[int, list[str]]]) -> Table:
    filled = ((number, cells) for number, cells in records if cells)
    _, header = next(filled, (0, []))
    if len(set(header)) < len(header):
        raise ValueError(f"{path} names a column twice in its header ({', '.join(header)})")
    rows, places = [], []
    for number, cells in filled:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}:{number} has {len(cells)} cells, its header {len(header)} "
                f"({', '.join(header)}): repair or remove the row"
            )
        rows.append(dict(zip(header, cells, strict=True)))
        places.append(f"{path}:{number}")
    return Table(tuple(header), rows, places, {})


def _json_lines(path: Path, text: str) -> Table:
    columns: dict[str, None] = {}
    rows, places = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number} is broken JSON ({error}): repair the line"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is {line[:40]!r}: each line must be a JSON object")
        columns.update(dict.fromkeys(row))
        rows.append(row)
        places.append(f"{path}:{number}")
    return Table(tuple(columns), rows, places, {})


def read_table(path: Path) -> Table:
    """The rows of one file. CSV has quotes, TSV never; both have one header line.

    Raises ``FileNotFoundError``, or ``ValueError`` with the line for what cannot be read.
    """
    extension = _extension(path)
    if extension not in EXTENSIONS:
        known = ", ".join(EXTENSIONS)
        raise ValueError(f"{path} has the unknown extension {extension!r}: use {known} (+ .gz)")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: check data.source and data.dev")
    text = _read_text(path)
    if extension == ".jsonl":
        table = _json_lines(path, text)
    else:
        table = _grid(path, _csv_records(text, path) if extension == ".csv" else _tsv_records(text))
    if not table.rows:
        raise ValueError(f"{path} is empty: it needs a row at least (and a header in CSV and TSV)")
    return table


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


def _hub(source: str, dev: str | None) -> Source:
    name, _, subset = source.partition(":")
    if source.startswith("glue/"):
        name, subset = "nyu-mll/glue", source.removeprefix("glue/")
        if subset not in GLUE:
            raise ValueError(f"data.source={source!r} is no GLUE task: choose of {', '.join(GLUE)}")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data.source={source!r} is no file or folder here, and data sets of the hub need the "
            "package datasets: pip install datasets, or name a file"
        ) from error
    try:
        splits = datasets.load_dataset(name, subset or None)
    except Exception as error:
        raise ValueError(
            f"data.source={source!r} is no file or folder here, and the hub gave no data set of "
            f"this id ({type(error).__name__}: {error}): check the id (id:subset where there are "
            "subsets) and the network, or use a file or data.source=stdlib"
        ) from error
    if "train" not in splits:
        raise ValueError(f"data.source={source!r} has no train split, only {', '.join(splits)}")
    if dev is not None and dev not in splits:
        raise ValueError(f"data.dev={dev!r} is no split of {source}: it has {', '.join(splits)}")
    chosen = dev or next((split for split in DEV_SPLITS if split in splits), None)

    def table(split: str) -> Table:
        rows = splits[split]
        named = {key: getattr(feature, "names", None) for key, feature in rows.features.items()}
        classes = {key: tuple(names) for key, names in named.items() if names}
        places = [f"{source} {split}[{i}]" for i in range(len(rows))]
        return Table(tuple(rows.column_names), list(rows), places, classes)

    return Source(source, table("train"), table(chosen) if chosen else None)


def read_source(source: str, dev: str | None = None) -> Source:
    """The train and dev tables of a folder, a file, a GLUE task (``glue/rte``) or a hub id.

    A folder holds train.<ext>[.gz] and perhaps a dev, validation, valid or test file, which also
    counts beside a single file train.<ext>. Hub ids may carry a subset (``id:subset``); a file or
    folder of the same name goes first. ``dev`` names a file, or a split of a hub data set.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _find(path, ["train"])
        if found is None:
            raise FileNotFoundError(
                f"the folder {path} has no train file: add train{', train'.join(EXTENSIONS)} (or "
                "with .gz), or set data.source to a file"
            )
        path = found
    elif not path.is_file():
        if _extension(path) in EXTENSIONS or source.startswith((".", "/", "~")):
            raise FileNotFoundError(f"data.source={source!r} does not exist: check the path")
        return _hub(source, dev)
    name = path.name.removesuffix(".gz").removesuffix(_extension(path))
    beside = None
    if name == "train":
        name, beside = path.parent.resolve().name, _find(path.parent, DEV_NAMES)
    file = beside if dev is None else Path(dev).expanduser()
    return Source(name, read_table(path), None if file is None else read_table(file))
