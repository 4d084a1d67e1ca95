"""The command, each part from its arguments to its exit status and its files."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_cases import Capsys, adapter, command, fails, python, work, works
from safetensors import SafetensorError

from loradrop.command.cli import main
from loradrop.methods import available

__all__ = ["adapter", "work"]  # fixtures


def test_train(work: Path) -> None:
    """In a process of its own: the tables and the files on stdout, progress alone on stderr."""
    output = work / "other"
    options = (work / "config.yaml", f"output={output}", "arms=", "train.steps=8", "--resume")
    status, out, err = python("-m", "loradrop", "train", *options)
    assert status == 0, err
    table, _, files = out.partition("\nwrote ")
    assert "held by" in table and "dev accuracy" in table and "LoRA-drop" in table
    wrote = [Path(line.strip()) for line in files.splitlines()]
    names = ("report.html", "importance.png", "loss.png", "plan.json", "config.yaml")
    assert wrote == [output / name for name in (*names, "lora-drop/adapter")]
    assert all(path.exists() for path in wrote)
    assert json.loads((output / "lora-drop" / "result.json").read_text())["steps"] == 8
    # A finished bar is the last part of its line.
    lines = [line.rpartition("\r")[2] for line in err.split("\n") if line]
    heads = [line.partition(":")[0].partition(",")[0] for line in lines]
    decided = "4 adapters for 6 targets"
    assert heads == ["films", "LoRA-drop", "adapted query (3)", "warmup", decided, "main"]
    assert "100%" in lines[-1] and "loss=" in lines[-1]


def test_train_without_a_file(work: Path, tmp_path: Path, capsys: Capsys) -> None:
    given = (f"model={work / 'base'}", f"data={work / 'films.csv'}", f"output={tmp_path}")
    changed = ("lora.r=2", "lora.method=lora", "train.steps=2", "name=LoRA", "data.max_length=16")
    out = works(capsys, "train", *given, "--resume", *changed)
    assert str(tmp_path / "lora" / "adapter") in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["config"]["r"] == 2 and plan["config"]["method"] == {"name": "lora"}


def test_train_with_the_spectral_method(work: Path, tmp_path: Path, capsys: Capsys) -> None:
    """The ranks that are left are in the terminal, in the report and in the pictures."""
    given = [f"model={work / 'base'}", f"data={work / 'films.csv'}", f"output={tmp_path}"]
    given += ["lora.r=4", "train.steps=10", "train.log_every=2", "data.max_length=16"]
    out = works(capsys, "train", *given, "method=spectral", "method.budget=0.5")
    plan = json.loads((tmp_path / "plan.json").read_text())
    ranks = plan["cut"]["ranks"]
    assert "and the rank that is left" in out and f"r{max(ranks.values())}" in out
    assert f"{sum(ranks.values())} of {8 * len(ranks)} directions" in out
    page = (tmp_path / "report.html").read_text()
    assert "What each direction is worth" in page and page.count("<svg") == 2
    assert f" r{max(ranks.values())}" in page and (tmp_path / "importance.png").exists()
    assert "r8" in works(capsys, "plan", "show", tmp_path / "spectral" / "adapter")


def test_train_refuses_a_used_output(work: Path, capsys: Capsys) -> None:
    written = (work / "run" / "config.yaml").read_text()
    status, out, err = command(capsys, "train", work / "config.yaml")
    refusal = f"{work / 'run' / 'lora'} holds a run already: resume, or choose another output"
    assert (status, out, err.splitlines()[-1]) == (2, "", f"loradrop: error: {refusal}")
    options = ("train", work / "config.yaml", "--resume", "lora.r=2")
    fails(capsys, "was begun with other options (lora: r)", *options)
    assert (work / "run" / "config.yaml").read_text() == written
    assert "dev accuracy" in works(capsys, "train", work / "config.yaml", "--resume")


def test_interrupted_says_how_to_go_on(capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loradrop.command.run.run", interrupt)
    again = "loradrop train 'name=a b' --resume continues from the last checkpoint"
    for arguments in (("train", "name=a b"), ("train", "name=a b", "--resume")):
        status, _, err = command(capsys, *arguments)
        assert (status, err.splitlines()[-1]) == (130, f"loradrop: interrupted: {again}")
    monkeypatch.setattr("loradrop.command.compression.open_adapter", interrupt)
    status, _, err = command(capsys, "compress", "a", "data=stdlib", "--heal", 3, "--out", "no")
    assert status == 130 and err.endswith("--out no --resume continues from the last checkpoint\n")
    status, _, err = command(capsys, "compress", "a", "--out", "no")
    assert (status, err.splitlines()[-1]) == (130, "loradrop: interrupted")
    monkeypatch.setattr("loradrop.command.run.measure", interrupt)
    status, _, err = command(capsys, "probe", "data=stdlib", "--adapter", "a")
    assert (status, err.splitlines()[-1]) == (130, "loradrop: interrupted")
    monkeypatch.setattr("loradrop.command.env.format_report", interrupt)
    assert command(capsys, "env") == (130, "", "loradrop: interrupted\n")


def test_probe_is_the_warm_up(work: Path, tmp_path: Path, capsys: Capsys) -> None:
    arguments = ("probe", work / "config.yaml", f"output={tmp_path}")
    out = works(capsys, *arguments)
    assert f"wrote {tmp_path / 'plan.json'}" in out and "held by" in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["warmup"]["steps"] == 4 and plan["scores"]["source"] == "online"
    assert not (tmp_path / "lora-drop" / "main").exists()
    assert command(capsys, *arguments)[0] == 2
    assert works(capsys, *arguments, "--resume") == out
    works(capsys, "train", work / "config.yaml", f"output={tmp_path}", "--resume")
    assert json.loads((tmp_path / "plan.json").read_text())["scores"] == plan["scores"]


@pytest.mark.parametrize("split", ["train", "dev"])
def test_probe_measures_an_adapter(
    split: str, work: Path, adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    measured = ("--adapter", adapter, "--batches", 1, "--split", split)
    out = works(capsys, "probe", work / "config.yaml", f"output={tmp_path}", *measured)
    file = tmp_path / "scores.json"
    assert f"wrote {file}" in out and "offline" in out
    scores = json.loads(file.read_text())
    assert (scores["source"], scores["split"], scores["rows"]) == ("offline", split, 1)
    assert scores["adapter"] == str(adapter) and len(scores["values"]) == 6
    assert all(value > 0 for value in scores["values"].values())


def test_probe_takes_the_base_of_the_adapter(
    work: Path, adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """Of a native one and of PEFT's, also with a file that names data alone."""
    (tmp_path / "data.yaml").write_text(
        f"data: {{source: {work / 'films.csv'}, max_length: 16, dev_ratio: 0.25}}"
    )
    works(capsys, "export", adapter, tmp_path / "peft")
    options = (f"output={tmp_path}", "train.batch_size=6", "--batches", 2)
    found = []
    for settings in (work / "config.yaml", tmp_path / "data.yaml"):
        for source in (adapter, tmp_path / "peft"):
            works(capsys, "probe", settings, *options, "--adapter", source)
            found.append(json.loads((tmp_path / "scores.json").read_text())["values"])
    assert found[0] == found[2] and found[1] == found[3] and found[0].keys() == found[1].keys()
    assert found[1] == pytest.approx(found[0], rel=1e-4)  # of the same deltas
    options = (tmp_path / "data.yaml", "--dry-run")
    assert "budget" in works(capsys, "compress", adapter, *options)


def test_probe_measures_the_tokens_that_the_mask_says(
    work: Path, adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    start = ("probe", work / "config.yaml", f"output={tmp_path}", "--adapter", adapter)
    tokens = []
    for more in ((), ("train.mask=null",)):
        works(capsys, *start[:3], *more, *start[3:])
        tokens.append(json.loads((tmp_path / "scores.json").read_text())["tokens"])
    assert 0 < tokens[0] < tokens[1]


def test_probe_errors(work: Path, adapter: Path, tmp_path: Path, capsys: Capsys) -> None:
    start = ("probe", work / "config.yaml", f"output={tmp_path}")
    for option in ("lora.r=2", "train.steps=3", "method=vera"):
        said = f"{option!r}: with --adapter only options of model and data, output, train."
        fails(capsys, said, *start, option, "--adapter", adapter)
    said = "--resume goes on with a warm-up, and --adapter asks for none"
    fails(capsys, said, *start, "--adapter", adapter, "--resume")
    fails(capsys, "--batches and --split need --adapter", *start, "--batches", 1)
    fails(capsys, "the method 'lora' measures nothing", *start, "lora.method=lora")
    fails(capsys, "is not there", *start, "--adapter", tmp_path / "none")


def test_plan(work: Path, adapter: Path, tmp_path: Path, capsys: Capsys) -> None:
    run = work / "run"
    paths = (run, run / "plan.json", adapter, adapter / "adapter.safetensors")
    shown = [command(capsys, "plan", "show", path) for path in paths]
    (tmp_path / "checkpoint-4").mkdir()
    shutil.copytree(adapter, tmp_path / "checkpoint-4" / "loradrop_adapter")
    shown.append(command(capsys, "plan", "show", tmp_path / "checkpoint-4"))
    assert shown[0][0] == 0 and shown == [shown[0]] * 5
    assert all(word in shown[0][1] for word in ("query", "value", "●", "○", "warm-up"))
    out = tmp_path / "heat.png"
    assert command(capsys, "plan", "plot", run, "--out", out) == (0, f"\nwrote {out}\n", "")
    assert out.read_bytes().startswith(b"\x89PNG")
    beside = adapter / "importance.png"
    status, printed, _ = command(capsys, "plan", "plot", adapter / "adapter.safetensors")
    assert (status, printed) == (0, f"\nwrote {beside}\n") and beside.exists()


def test_plan_errors(work: Path, tmp_path: Path, capsys: Capsys) -> None:
    newer, damaged = tmp_path / "newer.json", tmp_path / "damaged.json"
    plan = json.loads((work / "run" / "plan.json").read_text())
    newer.write_text(json.dumps(plan | {"schema": 99}))
    damaged.write_text('{"schema": 1')
    fails(capsys, "plan.json", "plan", "show", tmp_path)
    fails(capsys, "none.json", "plan", "show", tmp_path / "none.json")
    fails(capsys, "the plan has schema 99", "plan", "show", newer)
    fails(capsys, f"{damaged} is damaged or half-written", "plan", "show", damaged)
    fails(capsys, "films.csv is no adapter: give the folder", "plan", "show", work / "films.csv")
    fails(capsys, "--out is of loradrop plan plot", "plan", "show", work / "run", "--out", "x.png")
    svg = ("plan", "plot", work / "run", "--out", tmp_path / "x.svg")
    fails(capsys, "pictures are PNG files, so name one that ends in .png", *svg)
    assert not (tmp_path / "x.svg").exists()
    status, _, err = command(capsys, "plan", "shwo", work)
    assert status == 2 and "'shwo' is not one of 'show', 'plot', 'sweep'" in err


def test_what_cannot_be_written_is_said_at_once(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    """In a file's place no folder can be made, nor in a link to nowhere; no draft is named."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path / "file" / "x", tmp_path / "link"):
        for verb in ("train", "probe"):
            line = (verb, work / "config.yaml", f"output={folder}")
            message = fails(capsys, f"{folder} cannot be written (", *line)
            assert "name another folder by output=" in message
    picture = tmp_path / "file" / "x.png"
    line = ("plan", "plot", work / "run", "--out", picture)
    message = fails(capsys, f"{picture} cannot be written (", *line)
    assert "name another file by --out" in message and ".tmp" not in message
    monkeypatch.setattr("loradrop.op.tuned.folder", lambda: tmp_path / "file" / "loradrop")
    message = fails(capsys, "cannot be written (", "tune", "16x16", "--device", "cpu")
    assert "point XDG_CACHE_HOME to a folder" in message and "--out" not in message


def test_methods(capsys: Capsys) -> None:
    out = works(capsys, "methods")
    assert "lora: LoRA (Hu et al., arXiv:2106.09685): every target has its own A and B.\n" in out
    assert "keep LoRA where its output matters, share one elsewhere.\n" in out
    names = [line.partition(":")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert names == list(available())
    assert "    probe_steps      0.1\n" in out and "    source           'online'\n" in out
    assert "    budget           0.5\n" in out.partition("lora_drop: ")[2]  # what None comes to


def test_a_missing_file_is_said_before_training_is_loaded() -> None:
    code = (
        "import sys; from loradrop.command.cli import main\n"
        "assert main(['train', 'data=none.csv']) == 2\n"
        "assert 'loradrop.training.fit' not in sys.modules"
    )
    status, _, err = python("-c", code)
    assert status == 0 and err.startswith("loradrop: error: data.source='none.csv' does not exist")


@pytest.mark.parametrize(("rank", "is_first"), [(None, True), ("0", True), ("1", False)])
def test_the_first_rank_prints(
    rank: str | None, is_first: bool, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert ("wrote" in works(capsys, "plan", "plot", work / "run")) == is_first


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["verify", "-h"], ["trian"], []], ids=str
)
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from loradrop.command.cli import main
status = main({arguments!r})
heavy = {{"torch", "transformers", "yaml", "numpy", "matplotlib", "jinja2"}} & set(sys.modules)
sys.exit(str(heavy) if heavy else status)
"""
    status, out, err = python("-c", code)
    assert status == (0 if arguments and arguments[-1] in ("--help", "-h") else 2), err
    assert (out or err).startswith("Usage: loradrop")


def test_a_terminal_that_lacks_characters(work: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "loradrop", "plan", "show", str(work / "run")]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0 and b"?" in done.stdout and not done.stderr


def test_help_is_instant() -> None:
    """Less than what importing typer costs comes on top of it: CPU time, in one of five pairs."""

    def seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(*arguments)[0] == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    pairs = ((seconds("-c", "import typer"), seconds("-m", "loradrop", "--help")) for _ in range(5))
    assert any(help < 2 * bare for bare, help in pairs)


def test_help_names_every_command(capsys: Capsys) -> None:
    names = ("train", "probe", "plan", "export", "merge", "verify", "tune", "methods", "env")
    assert all(f"\n  {name} " in works(capsys, "--help") for name in names)
    for name in names:
        out = works(capsys, name, "--help")
        assert f"Usage: loradrop {name}" in out and "--debug" in out
        assert "completion" not in out and out.isascii()  # neither typer's options nor its boxes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "No such command 'trian'. Did you mean 'train'?"),
        ("xyzzy", "No such command 'xyzzy'"),
        ("", "Missing command"),
        ("train --resum", "--resume"),
        ("env now", "unexpected extra argument"),
        ("env --rank many", "Invalid value for '--rank'"),
        ("env --layer 4096x4096", "--layer '4096x4096': write it as 8192x4096x4096"),
        ("env --layer 1x2x3 --chip H100", "--chip 'H100': write it as 90:132"),
        ("env --layer 64x64x64 --rank 0", "--rank 0: the rank is a whole number of at least 1"),
        ("env --layer 64x64x64 --rank -3 --chip 90:132", "--rank -3: the rank is"),
        ("env --layer 64x64x64 --dropout 7 --chip 90:132", "dropout=7.0: choose 0, or a prob"),
        ("env --layer 64x64x64 --dropout nan", "dropout=nan: choose 0"),
        ("env --rank 5 --chip 90:132", "--rank 5 and --chip 90:132: name the layer too"),
        ("env --dropout 0", "--dropout 0.0: name the layer too, as --layer 8192x4096x4096"),
        ("env --dtype float32", "--dtype float32: name the layer too"),
        ("export a", "Missing argument 'out'"),
        ("export a b --format gguf", "'gguf' is not one of 'peft', 'merged'"),
        ("train no.yaml", "no.yaml is not a file: give a YAML file, or only key=value"),
        ("train trian.steps=3", "has no option 'trian': did you mean 'train'?"),
        ("train train.stepz=3", "train has no option 'stepz': did you mean 'steps'?"),
        ("train lora.method.treshold=1", "has no option 'treshold': did you mean 'threshold'?"),
        ("train train.steps=3 other.yaml", "'other.yaml' is not an override"),
        ("train data=none.csv", "data.source='none.csv' does not exist"),
        ("plan show none", "none"),
        ("verify none none", "none is not there: give the folder loradrop.save wrote"),
    ],
)
def test_what_is_wrong_is_named(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = command(capsys, *arguments.split())
    assert (status, out) == (2, "")
    assert message in err and "error: " in err.lower() and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_overrides_may_stand_after_options(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spy(config: Any, resume: bool) -> dict[str, Any]:
        seen.append((config.train.steps, config.train.seed, resume))
        return {}

    monkeypatch.setattr("loradrop.command.run.run", spy)
    config = tmp_path / "lr=1.yaml"
    config.write_text("train: {steps: 3, seed: 5}")
    for arguments in (
        (config, "--resume"),
        ("train.steps=3", "--resume", "train.seed=5"),
        ("--resume", "train.steps=3", "train.seed=5"),
        ("train.steps=9", "train.seed=5", "--resume", "train.steps=3"),
    ):
        assert command(capsys, "train", *arguments)[0] == 0
    assert seen == [(3, 5, True)] * 4


@pytest.mark.parametrize("kind", [SafetensorError, AttributeError])
def test_a_traceback_is_for_faults_of_ours(
    kind: type[Exception], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise kind("no space left")

    monkeypatch.setattr("loradrop.methods.available", broken)
    if kind is SafetensorError:
        return fails(capsys, "no space left", "methods")
    with pytest.raises(AttributeError):
        main(["methods"])


def test_debug_shows_where_an_error_comes_from(capsys: Capsys) -> None:
    with pytest.raises(ValueError, match="has no option"):
        command(capsys, "train", "trian.steps=3", "--debug")
