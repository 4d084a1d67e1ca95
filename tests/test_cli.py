"""The command, each part from its arguments to its exit status and its files."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import write_model, write_table

import loradrop
from loradrop.cli import Dtype, main
from loradrop.formats.peft import DTYPES
from loradrop.methods import available
from loradrop.run import load_base


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a table, a configuration, and what `loradrop train` makes of them."""
    folder = tmp_path_factory.mktemp("work")
    write_table(folder / "films.csv")
    (folder / "config.yaml").write_text(
        f"""
        model: {write_model(folder / "base")}
        data: {{source: {folder / "films.csv"}, max_length: 16, dev_ratio: 0.25}}
        lora: {{r: 4, lora_alpha: 8, method: {{keep_ratio: 0.34, probe_steps: 4}}}}
        train: {{steps: 12, batch_size: 6, learning_rate: 3e-2, log_every: 2, save_every: 4}}
        arms: {{LoRA: {{method: lora}}}}
        output: {folder / "run"}
        """
    )
    assert main(["train", str(folder / "config.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def adapter(work: Path) -> Path:
    return work / "run" / "lora-drop" / "adapter"


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `loradrop` with these arguments."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def python(*arguments: Any) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of an interpreter of its own."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_train(work: Path) -> None:
    """In a process of its own: the tables and the files on stdout, progress alone on stderr."""
    output = work / "other"
    status, out, err = python(
        *("-m", "loradrop", "train", work / "config.yaml", f"output={output}"),
        *("arms=", "train.steps=8", "--resume"),
    )
    assert status == 0, err
    table, _, files = out.partition("\nwrote ")
    assert "held by" in table and "dev accuracy" in table and "LoRA-drop" in table
    wrote = [Path(line.strip()) for line in files.splitlines()]
    assert wrote == [
        *(output / name for name in ("report.html", "importance.png", "loss.png")),
        *(output / name for name in ("plan.json", "config.yaml", "lora-drop/adapter")),
    ]
    assert all(path.exists() for path in wrote)
    assert json.loads((output / "lora-drop" / "result.json").read_text())["steps"] == 8
    # A finished bar is the last part of its line.
    lines = [line.rpartition("\r")[2] for line in err.split("\n") if line]
    assert [line.partition(":")[0].partition(",")[0] for line in lines] == [
        *("films", "LoRA-drop", "adapted query (3)", "warmup", "main")
    ]
    assert "100%" in lines[-1] and "loss=" in lines[-1]


def test_train_without_a_file(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = command(
        *(capsys, "train", f"model={work / 'base'}", f"data={work / 'films.csv'}", "--resume"),
        *("lora.r=2", "lora.method=lora", "train.steps=2", f"output={tmp_path}", "name=LoRA"),
        "data.max_length=16",
    )
    assert status == 0 and str(tmp_path / "lora" / "adapter") in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["config"]["r"] == 2 and plan["config"]["method"] == {"name": "lora"}


def test_train_refuses_a_used_output(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = (work / "run" / "config.yaml").read_text()
    status, out, err = command(capsys, "train", work / "config.yaml")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == (
        f"loradrop: error: {work / 'run' / 'lora'} holds a run already: resume, or choose "
        "another output"
    )
    status, _, err = command(capsys, "train", work / "config.yaml", "--resume", "lora.r=2")
    assert status == 2 and "was begun with other options (lora: r)" in err
    assert (work / "run" / "config.yaml").read_text() == written
    status, out, _ = command(capsys, "train", work / "config.yaml", "--resume")
    assert status == 0 and "dev accuracy" in out


def test_interrupted_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loradrop.run.run", interrupt)
    for arguments in (("train", "name=a b"), ("train", "name=a b", "--resume")):
        status, _, err = command(capsys, *arguments)
        assert status == 130
        assert err.splitlines()[-1] == (
            "loradrop: interrupted: loradrop train 'name=a b' --resume continues from the last "
            "checkpoint"
        )
    monkeypatch.setattr("loradrop.env.format_report", interrupt)
    assert command(capsys, "env") == (130, "", "loradrop: interrupted\n")


def test_probe_is_the_warm_up(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("probe", work / "config.yaml", f"output={tmp_path}")
    status, out, _ = command(capsys, *arguments)
    assert status == 0 and f"wrote {tmp_path / 'plan.json'}" in out and "held by" in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["warmup"]["steps"] == 4 and plan["scores"]["source"] == "online"
    assert not (tmp_path / "lora-drop" / "main").exists()
    assert command(capsys, *arguments)[0] == 2
    status, again, _ = command(capsys, *arguments, "--resume")
    assert (status, again) == (0, out)
    assert command(capsys, "train", work / "config.yaml", f"output={tmp_path}", "--resume")[0] == 0
    assert json.loads((tmp_path / "plan.json").read_text())["scores"] == plan["scores"]


@pytest.mark.parametrize("split", ["train", "dev"])
def test_probe_measures_an_adapter(
    split: str, work: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = command(
        *(capsys, "probe", work / "config.yaml", f"output={tmp_path}"),
        *("--adapter", adapter, "--batches", 1, "--split", split),
    )
    file = tmp_path / "scores.json"
    assert status == 0 and f"wrote {file}" in out and "offline" in out
    scores = json.loads(file.read_text())
    assert (scores["source"], scores["split"], scores["rows"]) == ("offline", split, 1)
    assert scores["adapter"] == str(adapter) and len(scores["values"]) == 6
    assert all(value > 0 for value in scores["values"].values())


def test_probe_errors(
    work: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ("probe", work / "config.yaml", f"output={tmp_path}")
    for more, message in (
        (("--batches", 1), "--batches and --split need --adapter"),
        (("lora.method=lora",), "the method 'lora' measures nothing"),
        (("--adapter", adapter, "--batches", 0), "batches is empty"),
        (("--adapter", tmp_path / "none"), "is not there"),
    ):
        status, _, err = command(capsys, *start, *more)
        assert status == 2 and message in err.splitlines()[-1]


def test_plan(
    work: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = work / "run"
    shown = [
        command(capsys, "plan", "show", path)
        for path in (run, run / "plan.json", adapter, adapter / "adapter.safetensors")
    ]
    assert shown[0][0] == 0 and shown == [shown[0]] * 4
    assert all(word in shown[0][1] for word in ("query", "value", "●", "○", "warm-up"))
    out = tmp_path / "heat.png"
    assert command(capsys, "plan", "plot", run, "--out", out) == (0, f"\nwrote {out}\n", "")
    assert out.read_bytes().startswith(b"\x89PNG")
    beside = adapter / "importance.png"
    status, printed, _ = command(capsys, "plan", "plot", adapter / "adapter.safetensors")
    assert (status, printed) == (0, f"\nwrote {beside}\n") and beside.exists()


def test_plan_errors(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer = tmp_path / "newer.json"
    plan = json.loads((work / "run" / "plan.json").read_text())
    newer.write_text(json.dumps(plan | {"schema": 99}))
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"schema": 1')
    for path, message in (
        (tmp_path, "plan.json"),
        (tmp_path / "none.json", "none.json"),
        (newer, "the plan has schema 99"),
        (damaged, f"{damaged} is damaged or half-written"),
        (work / "films.csv", "is damaged"),
    ):
        status, out, err = command(capsys, "plan", "show", path)
        assert (status, out) == (2, "") and err.startswith("loradrop: error: ") and message in err
    status, _, err = command(capsys, "plan", "shwo", work)
    assert status == 2 and "'shwo' is not one of 'show', 'plot'" in err


def test_export_and_verify(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "peft"
    status, printed, _ = command(capsys, "export", adapter, out)
    assert status == 0 and f"wrote {out}" in printed and "peft       takes it" in printed
    assert (out / "adapter_config.json").exists() and (out / "adapter_model.safetensors").exists()
    status, printed, _ = command(capsys, "verify", adapter, out)
    assert status == 0 and "logits (peft): ok" in printed
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_B" in key)
    save_file(tensors | {key: tensors[key] * 2}, file, {"format": "pt"})
    status, printed, _ = command(capsys, "verify", adapter, out)
    assert status == 1 and "WRONG" in printed


def test_export_options(
    work: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert get_args(Dtype) == tuple(DTYPES)
    narrow = tmp_path / "narrow"
    status, *_ = command(capsys, "export", adapter, narrow, "--dtype", "bfloat16")
    assert status == 0
    factors = {k: t.dtype for k, t in load_file(narrow / "adapter_model.safetensors").items()}
    assert {dtype for key, dtype in factors.items() if "lora_" in key} == {torch.bfloat16}
    assert command(capsys, "verify", adapter, narrow)[0] == 0
    refused = tmp_path / "refused"
    status, _, err = command(capsys, "export", adapter, refused, "--engine", "sglang")
    assert status == 2 and "sglang cannot take this adapter" in err and not refused.exists()
    # The same model under another path, without a tokenizer
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(work / "base" / name, moved)
    status, printed, _ = command(capsys, "verify", adapter, narrow, "--model", moved)
    assert status == 0 and "comparing on arbitrary tokens" in printed
    status, *_ = command(capsys, "export", adapter, tmp_path / "named", "--model", moved)
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert status == 0 and config["base_model_name_or_path"] == str(moved)
    status, _, err = command(capsys, "export", adapter, tmp_path / "x", "--model", "not/there")
    assert status == 2 and "loradrop: error: the model 'not/there' cannot be loaded" in err


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        (("merge",), torch.float32),
        (("export", "--format", "merged"), torch.float32),
        (("merge", "--dtype", "bfloat16"), torch.bfloat16),
    ],
)
def test_merge_and_verify(
    arguments: tuple[str, ...],
    dtype: torch.dtype,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "merged"
    status, printed, _ = command(capsys, *arguments, adapter, out)
    assert status == 0 and f"wrote {out}" in printed
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
    assert (out / "tokenizer.json").exists()
    status, printed, _ = command(capsys, "verify", adapter, out)
    assert status == 0 and printed.startswith("logits (merged): ok")
    model, _ = load_base(adapter)  # without the adapter
    model.save_pretrained(out)
    status, printed, _ = command(capsys, "verify", adapter, out)
    assert status == 1 and "DIFFER" in printed


def test_pickle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"A": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    for arguments in (("export", tmp_path, tmp_path / "out"), ("plan", "show", tmp_path)):
        status, _, err = command(capsys, *arguments)
        assert status == 2 and "is a pickle, which can run any code when it is loaded" in err


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(capsys, "methods")
    assert status == 0
    assert "lora: LoRA (Hu et al., arXiv:2106.09685): every target has its own A and B.\n" in out
    assert "keep LoRA where its output matters, share one elsewhere.\n" in out
    names = [line.partition(":")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert names == list(available())
    assert "    probe_steps      0.1\n" in out and "    source           'online'\n" in out


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(capsys, "env")
    assert status == 0 and loradrop.__version__ in out and torch.__version__ in out


def test_version() -> None:
    version = f"loradrop {loradrop.__version__}\n"
    for arguments in (["--version"], ["--version", "env"]):
        assert python("-m", "loradrop", *arguments) == (0, version, "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["verify", "-h"], ["trian"], []], ids=str
)
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from loradrop.cli import main
status = main({arguments!r})
heavy = {{"torch", "transformers", "yaml", "numpy", "matplotlib", "jinja2"}} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""
    status, out, err = python("-c", code)
    assert status == (0 if arguments and arguments[-1] in ("--help", "-h") else 2), err
    assert (out or err).startswith("Usage: loradrop")


def test_help_is_instant() -> None:
    """Less than what importing typer costs comes on top of it: CPU time, the least of three."""

    def seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(*arguments)[0] == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    pairs = [(seconds("-c", "import typer"), seconds("-m", "loradrop", "--help")) for _ in range(3)]
    bare, help = map(min, zip(*pairs, strict=True))
    assert help < 2 * bare


def test_env_explains_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ("--layer", "8192x4096x4096", "--rank", "64", "--dropout", "0.1")
    status, out, _ = command(capsys, "env", *layer, "--chip", "90:132")
    assert status == 0
    first, *choices = out.splitlines()
    assert "8192 tokens, 4096 to 4096, rank 64, dropout 0.1, bfloat16, sm_90 x 132" in first
    assert [line.split()[0] for line in choices] == ["forward", "forward"]
    assert all("measured" in line and ", in µs: " in line for line in choices)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(capsys, "--help")
    names = ("train", "probe", "plan", "export", "merge", "verify", "methods", "env")
    assert status == 0 and all(f"\n  {name} " in out for name in names)
    for name in names:
        status, out, _ = command(capsys, name, "--help")
        assert status == 0 and f"Usage: loradrop {name}" in out and "--debug" in out
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
        ("export a", "Missing argument 'out'"),
        ("export a b --format gguf", "'gguf' is not one of 'peft', 'merged'"),
        ("train none.yaml", "none.yaml is not a file: give a YAML file, or only key=value"),
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
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = command(capsys, *arguments.split())
    assert (status, out) == (2, "")
    assert message in err and "error: " in err.lower() and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_overrides_may_stand_after_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spy(config: Any, resume: bool) -> dict[str, Any]:
        seen.append((config.train.steps, config.train.seed, resume))
        return {}

    monkeypatch.setattr("loradrop.run.run", spy)
    for arguments in (
        ("train.steps=3", "--resume", "train.seed=5"),
        ("--resume", "train.steps=3", "train.seed=5"),
        ("train.steps=9", "train.seed=5", "--resume", "train.steps=3"),
    ):
        assert command(capsys, "train", *arguments)[0] == 0
    assert seen == [(3, 5, True)] * 3


def test_debug_shows_where_an_error_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="has no option"):
        command(capsys, "train", "trian.steps=3", "--debug")
