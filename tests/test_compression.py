"""`loradrop compress`: a trained adapter, cut by what its directions are worth."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import Capsys, adapter, command, fails, work, works
from run_cases import WORDS, write_model, write_table
from safetensors.torch import save_file
from torch.testing import assert_close
from training_runs import At, StopError, counting, stop

import loradrop
from loradrop import native
from loradrop.command import compression
from loradrop.command.adapter_bases import load_base
from loradrop.command.cli import main
from loradrop.command.compression import HEALING, PAGE, SPECTRUM
from loradrop.formats.hub import CARD
from loradrop.formats.peft_file import CONFIG, TENSORS, read
from loradrop.plan_file import REPORT
from loradrop.scores import spread
from loradrop.training import fit as training

__all__ = ["adapter", "work"]  # fixtures


@pytest.fixture(scope="module")
def trained(work: Path) -> Path:
    """LoRA of rank 4 on every linear layer, as PEFT writes it."""
    lora = ["lora.method=lora", "lora.target_modules=all-linear", "name=all", "arms="]
    options = [str(work / "config.yaml"), f"output={work / 'all'}", "train.steps=30", *lora]
    assert main(["train", *options]) == 0
    model, _ = load_base(work / "all" / "all" / "adapter")
    loradrop.load(model, work / "all" / "all" / "adapter")
    loradrop.export(model, work / "peft", base_id=str(work / "base"))
    return work / "peft"


def data(work: Path) -> tuple[str, str]:
    return f"data={work / 'films.csv'}", "data.max_length=16"


@pytest.mark.parametrize("named", [False, True])
def test_classes_that_only_the_data_names_are_told(
    named: bool, work: Path, adapter: Path, trained: Path, capsys: Capsys
) -> None:
    """A native adapter knows them, and PEFT's format does not."""
    source = adapter if named else trained
    _, _, said = command(capsys, "compress", source, *data(work), "--dry-run")
    order = "by alphabet (0: bad, 1: good). Where that is not their order, write the labels as"
    assert (order in said) == (not named)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 5 + 8)[None] % (len(WORDS) + 5)
    with torch.no_grad():
        found: torch.Tensor = model.eval().double()(input_ids=ids).logits
    return found


def test_a_quarter_of_a_peft_adapter(
    trained: Path, work: Path, tmp_path: Path, capsys: Capsys
) -> None:
    peft, before = pytest.importorskip("peft"), files(trained)
    out = tmp_path / "small"
    text = works(capsys, "compress", trained, *data(work), "--budget", "0.25", "--out", out)
    assert files(trained) == before
    table = text.splitlines()[:6]
    assert table[0].split()[:2] == ["budget", "parameters"] and "predicted rise" in table[0]
    assert "dev accuracy" in text and f"wrote {out}" in text and (out / SPECTRUM).exists()
    page = (out / PAGE).read_text()
    assert "cut from" in page and "What each direction is worth" in page and "<svg" in page
    report = json.loads((out / REPORT).read_text())
    large, small = read(trained), read(out)
    whole = sum(4 * (A.shape[1] + B.shape[0]) for A, B in large.modules.values())  # padded to 8
    size = sum(A.numel() + B.numel() for A, B in small.modules.values())
    assert 0.2 * whole < size <= 0.25 * whole and report["plan"]["parameters"] == size
    assert set(report["metrics"]) == {"before", "after"} and report["plan"]["cut"]["loss"] >= 0
    ranks = {name: len(A) for name, (A, _) in small.modules.items()}
    assert ranks == {n: k for n, k in report["plan"]["cut"]["ranks"].items() if k}
    card, cut = (out / CARD).read_text(), report["plan"]["cut"]
    assert f"Predicted rise of the loss: {cut['loss']:.2g}." in card
    assert "\n\nCut to the directions that are worth most, by the predicted rise" in card
    queries = [k for name, k in cut["ranks"].items() if name.endswith("query")]
    assert f"\n| query | 4 | {spread(queries)} |\n" in card
    assert f" {size:,} parameters are left" in card
    base, _ = load_base(out)
    theirs = peft.PeftModel.from_pretrained(load_base(out)[0], out)
    loradrop.load(base, out)
    assert_close(logits(base), logits(theirs))
    assert base.lora_bank.trainable == size
    shown = [works(capsys, "plan", "show", path) for path in (out, out / REPORT)]
    assert shown[0] == shown[1] and "the rank that is left" in shown[0]
    drawn = works(capsys, "plan", "plot", out)
    assert (out / "importance.png").exists() and "importance.png" in drawn


@pytest.mark.parametrize(
    "how", ["native", "time", "padded", "multiple", "max-loss", "weights", "healed"]
)
def test_ways_to_compress(
    how: str, trained: Path, adapter: Path, work: Path, tmp_path: Path, capsys: Capsys
) -> None:
    out, source, options = tmp_path / "small", trained, [*data(work)]
    options += {
        "native": [], "time": ["--budget-time", "0.8"],
        "padded": ["--padded"], "multiple": ["--multiple", "2", "--budget", "0.5"],
        "max-loss": ["--max-loss", "0.002"], "weights": [],
        "healed": ["--heal", "4", "train.learning_rate=1e-3", "train.batch_size=6"],
    }[how]  # fmt: skip
    if how == "native":  # which shares
        source = adapter
    if how == "weights":
        options = []
    text = works(capsys, "compress", source, *options, "--out", out)
    report, small = json.loads((out / REPORT).read_text()), read(out)
    cut, ranks = report["plan"]["cut"], [len(A) for A, _ in small.modules.values()]
    assert cut["metric"] == ("weight" if how == "weights" else "loss")
    if how == "padded":
        assert set(ranks) == {8}
    elif how == "time":
        assert {n for n, k in cut["ranks"].items() if k} <= {
            n for n in cut["ranks"] if ".0." not in n
        }
    elif how == "multiple":
        assert set(ranks) <= {2, 4}
    elif how == "max-loss":
        assert 0 < cut["loss"] <= 0.002
    elif how == "weights":
        assert report["metrics"] == {} and "kept by weight" in text
        card = (out / CARD).read_text()
        assert "without data: " in card and "rise of the loss" not in card
    elif how == "healed":
        assert report["heal"] == 4
        assert "cut and healed" in (out / PAGE).read_text()
    base, _ = load_base(out)
    loradrop.load(base, out)
    assert logits(base).isfinite().all()


def test_healing_resumes(
    trained: Path, work: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the last checkpoint, to the adapter of a run without an interruption."""
    steps = ["--heal", "6", "train.save_every=2", "train.batch_size=6"]
    ways = ("compress", trained, *data(work), *steps)
    whole, out, made = tmp_path / "whole", tmp_path / "resumed", list[int]()
    works(capsys, *ways, "--out", whole)
    assert not (whole / HEALING).exists()
    with monkeypatch.context() as patch:
        stopped = partial(training.fit, callbacks=[At("main", 3, stop)])
        patch.setattr(training, "fit", stopped)
        with pytest.raises(StopError):
            main([*map(str, ways), "--out", str(out), "--debug"])
    capsys.readouterr()
    assert [file.name for file in out.iterdir()] == [HEALING]
    fails(capsys, "go on with --resume", *ways, "--out", out)
    status, _, err = command(capsys, *ways, "--out", out, "--resume", "--budget", 0.5)
    assert status == 2 and "data: ranks" in err
    monkeypatch.setattr(training, "fit", partial(training.fit, callbacks=counting(made)))
    works(capsys, *ways, "--out", out, "--resume")
    assert made == [3, 4, 5, 6]
    ours, theirs = read(out).modules, read(whole).modules
    for name, pair in theirs.items():
        assert all(torch.equal(*factors) for factors in zip(ours[name], pair, strict=True))
    fails(capsys, "is not empty", *ways, "--out", out, "--resume")


@pytest.mark.parametrize("last", [SPECTRUM, PAGE])
def test_what_was_healed_is_written_by_a_resume(
    last: str, trained: Path, work: Path, tmp_path: Path, capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where the disk was full, or the call was killed in the middle of a file."""
    ways = ("compress", trained, *data(work), "--heal", "3", "train.batch_size=6")
    whole, out, made = tmp_path / "whole", tmp_path / "resumed", list[int]()
    works(capsys, *ways, "--out", whole)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compression, {SPECTRUM: "plot_spectra", PAGE: "write_report"}[last], full)
        status, _, err = command(capsys, *ways, "--out", out)
        assert status == 2 and "No space left" in err
    (out / ".adapter_model.safetensors.0123abcd.tmp").write_bytes(b"half")
    assert {HEALING, TENSORS, CONFIG, REPORT} < {file.name for file in out.iterdir()}
    fails(capsys, "go on with --resume", *ways, "--out", out)
    notes = out / "notes.txt"
    notes.write_text("mine")
    fails(capsys, "holds notes.txt beside the healing", *ways, "--out", out, "--resume")
    assert notes.read_text() == "mine" and (out / HEALING).exists()
    notes.unlink()
    refused = "--resume goes on with a healing: give its --heal STEPS"
    fails(capsys, refused, *ways[:4], "--out", out, "--resume")
    monkeypatch.setattr(training, "fit", partial(training.fit, callbacks=counting(made)))
    works(capsys, *ways, "--out", out, "--resume")
    assert made == [] and {f.name for f in out.iterdir()} == {f.name for f in whole.iterdir()}
    ours, theirs = read(out).modules, read(whole).modules
    for name, pair in theirs.items():
        assert all(torch.equal(*factors) for factors in zip(ours[name], pair, strict=True))
    fails(capsys, "is not empty", *ways, "--out", out, "--resume")


def test_a_dry_run_writes_nothing(
    trained: Path, work: Path, tmp_path: Path, capsys: Capsys, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "small"
    dry = ("compress", trained, *data(work), "--dry-run", "--out", out)
    text = works(capsys, *dry)
    assert caplog.text.count("batches were measured, and below 64 the predicted rise") == 1
    assert "predicted rise of the loss" in text and "--budget" not in text and not out.exists()
    for asked in (("--budget", "0.3"), ("--max-loss", "0.002")):
        *fixed, row = rows_of(works(capsys, *dry, *asked))
        assert row[0] == " ".join(asked) and fixed == rows_of(text)
    assert int(row[1].replace(",", "")) < int(fixed[0][1].replace(",", ""))
    assert 0 < float(row[4]) <= 0.002


def rows_of(table: str) -> list[list[str]]:
    """The cells of each row but the heads."""
    return [re.split(" {2,}", line) for line in table.splitlines()[1:] if line]


@pytest.mark.parametrize("options", [[], ["--padded"]], ids=["own ranks", "padded"])
def test_the_table_says_what_the_file_will_hold(
    options: list[str], trained: Path, adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """A shared adapter once for each member, and what pads."""
    shares, apart = native.read(adapter).plan, set[bool]()
    assert shares.assignment.shares
    for i, source in enumerate((trained, adapter)):
        out = tmp_path / str(i)
        text = works(capsys, "compress", source, "--budget", "0.5", *options, "--out", out)
        size = sum(A.numel() + B.numel() for A, B in read(out).modules.values())
        report = json.loads((out / REPORT).read_text())
        table = text.partition("\n\n")[0]
        (row,) = [row for row in rows_of(table) if row[0] == "0.5"]
        parameters, held, held_bytes = (int(cell.replace(",", "")) for cell in row[1:4])
        assert (held, held_bytes, parameters) == (size, 4 * size, report["plan"]["parameters"])
        assert report["file"] == {"elements": size, "bytes": 4 * size, "dtype": "float32"}
        assert f"{size:,} elements" in (out / PAGE).read_text()
        apart.add(held > parameters)
    assert True in apart


@pytest.mark.parametrize(
    ("kinds", "options", "want"),
    [
        (["bfloat16"], [], "bfloat16"),
        (["float16"], [], "float16"),
        (["bfloat16", "float16"], [], "float32"),
        (["bfloat16"], ["--dtype", "float32"], "float32"),
        (["native"], [], "bfloat16"),
    ],
)
def test_the_dtype_of_the_file_stays(
    kinds: list[str], options: list[str], want: str, trained: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """Also that of the head, which was trained whole."""
    source, out = tmp_path / "narrow", tmp_path / "small"
    if kinds == ["native"]:
        model, _ = load_base(trained)
        loradrop.load(model, trained)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        loradrop.save(model, source)
    else:
        dtypes = [getattr(torch, kind) for kind in kinds]
        whole = enumerate(read(trained).tensors.items())
        tensors = {key: value.to(dtypes[i % len(dtypes)]) for i, (key, value) in whole}
        source.mkdir()
        (source / CONFIG).write_bytes((trained / CONFIG).read_bytes())
        save_file(tensors, source / TENSORS)
    text = works(capsys, "compress", source, "--budget", "0.5", *options, "--out", out)
    dtype, small = getattr(torch, want), read(out)
    pairs = [factor for pair in small.modules.values() for factor in pair]
    assert {factor.dtype for factor in pairs} == {dtype} and f"{want} bytes" in text
    held = sum(factor.numel() for factor in pairs) * dtype.itemsize
    report = json.loads((out / REPORT).read_text())
    assert (report["file"]["bytes"], report["file"]["dtype"]) == (held, want)
    assert f"{held:,} bytes ({want})" in (out / PAGE).read_text()
    assert small.others and {t.dtype.itemsize for t in small.others.values()} == {2}
    base, _ = load_base(out)
    loradrop.load(base, out)
    assert logits(base).isfinite().all()


def test_bad_input_is_refused(
    trained: Path, work: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(capsys, "choose another output", "compress", trained, "--out", trained / "small")
    fails(capsys, "choose another output", "compress", trained, "--out", trained)
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    fails(capsys, "is not empty", "compress", trained, "--out", full)
    with monkeypatch.context() as patch:  # before anything is measured
        patch.setattr(compression, "open_adapter", None)
        below = full / "note.txt" / "small"
        fails(capsys, f"{below} cannot be written (", "compress", trained, "--out", below)
    other = ("compress", trained, "--out", tmp_path / "small")
    fails(capsys, "--heal 3 needs data", *other, "--heal", 3)
    fails(capsys, "below one direction", *other, "--budget", 0.001)
    fails(capsys, "--max-loss 0.1 needs data", *other, "--max-loss", 0.1)
    fails(capsys, "--measured 5 needs data", *other, "--measured", 5)
    with monkeypatch.context() as patch:  # before the adapter is opened
        patch.setattr(compression, "open_adapter", None)
        fails(capsys, "budget=25: choose a number in (0, 1]", *other, "--budget", 25)
        fails(capsys, "budget=0: choose a number in (0, 1]", *other, "--budget", 0)
        fails(capsys, "max_loss=-1.0", *other, "--max-loss", -1, *data(work))
        fails(capsys, "--max-loss 0 needs data", *other, "--max-loss", 0)
        fails(capsys, "exactly one of", *other, "--budget", 0.5, "--max-loss", 0.1, *data(work))
        fails(capsys, "multiple=0", *other, "--multiple", 0)
        fails(capsys, "budget_time=0.5", *other, "--budget-time", 0.5)
    for option in ("output=mine", "lora.r=2", "method=vera"):
        said = f"{option!r}: this command takes options of model, data and train"
        fails(capsys, said, *other, option)
    for option in ("train.steps=3", "train.epochs=1"):
        said = f"{option!r}: --heal says how many steps to train"
        fails(capsys, said, *other, option, "--heal", 3, *data(work))
    fails(capsys, "'train.learning_rate=1' is of training", *other, "train.learning_rate=1")
    fails(capsys, "--heal -1: give a number of steps", *other, "--heal", -1)
    numbers = write_table(tmp_path / "numbers.csv", "numbers")
    fails(capsys, "the data is regression with 1 labels", *other, f"data={numbers}")
    strange = write_model(tmp_path / "strange", "llama")
    fails(capsys, "is an adapter for another model", *other, f"model={strange}")
    dora = tmp_path / "dora"
    dora.mkdir()
    for file in trained.iterdir():
        (dora / file.name).write_bytes(file.read_bytes())
    config = json.loads((dora / "adapter_config.json").read_text()) | {"use_dora": True}
    (dora / "adapter_config.json").write_text(json.dumps(config))
    fails(capsys, "use_dora", "compress", dora, "--out", tmp_path / "small")
    model, _ = load_base(trained)
    vera = loradrop.LoRAConfig(
        r=4, target_modules=("query",), method=loradrop.methods.get("vera")()
    )
    loradrop.inject(model, vera)
    loradrop.save(model, tmp_path / "vera")
    monkeypatch.setattr(compression, "rows_for", None)  # before anything is measured
    message = "'vera' has no pair (A, B) for each target to cut: export the adapter"
    fails(capsys, message, "compress", tmp_path / "vera", *data(work), "--dry-run")
    assert not (tmp_path / "small").exists()


def test_what_peft_cannot_hold_has_a_way_out(
    work: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """The biases of adapted layers that were trained too: the remedy that is named is one."""
    peft = pytest.importorskip("peft")
    options = {"r": 4, "target_modules": ["query"], "bias": "lora_only", "task_type": "SEQ_CLS"}
    base, _ = load_base(trained_on := work / "run" / "lora" / "adapter")
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        torch.nn.init.normal_(parameter.data, std=0.1)
    model.save_pretrained(tmp_path / "biased")
    source = ("compress", tmp_path / "biased", "--out", tmp_path / "small")
    status, _, err = command(capsys, *source)
    remedy = "Instead, cut it in Python (loradrop.truncate, then loradrop.save)"
    assert status == 2 and remedy in err and "merged" not in err
    base, _ = load_base(trained_on)
    loradrop.load(base, tmp_path / "biased")
    ranks = {target.name: 1 for target in base.lora_bank.targets}
    loradrop.truncate(base, ranks, metric="weight")
    loradrop.save(base, tmp_path / "native")
    again, _ = load_base(trained_on)
    loradrop.load(again, tmp_path / "native")
    assert_close(logits(again), logits(base))


@pytest.mark.parametrize("rise", [0.5, 0.01])
def test_a_prediction_that_was_wrong_is_said(
    rise: float, trained: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Capsys,
) -> None:  # fmt: skip
    found = iter([{"loss": 1.0}, {"loss": 1.0 + rise}])
    monkeypatch.setattr(compression, "_evaluated", lambda *_: next(found))
    out = tmp_path / "small"
    assert main(["compress", str(trained), *data(work), "--budget", "0.9", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert ("the loss on dev rose by 0.5" in said) == (rise == 0.5)


def test_the_dtype_of_the_base_is_asked_for(
    trained: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    seen = []

    def opened(model: Any, *given: Any, **more: Any) -> Any:
        seen.append(model.dtype)
        raise ValueError("seen")

    monkeypatch.setattr(compression, "rows_for", opened)
    fails(capsys, "seen", "compress", trained, *data(work), "model.dtype=bfloat16", "--dry-run")
    assert seen == [torch.bfloat16]
