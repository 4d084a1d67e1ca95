"""`loradrop tune`: what it measures, its check, and who fails."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import Capsys, command, fails, works
from op_cases import call_of, draw
from run_cases import write_model
from test_tuned import H200, POINT

from loradrop import LoRAConfig
from loradrop.command import tuning
from loradrop.files import read_json
from loradrop.kernels.tiles import Machine
from loradrop.measuring import child, correct, workers
from loradrop.measuring.cases import as_peft, make_case, ours
from loradrop.op import dispatch, tuned
from loradrop.op.points import BACKWARD, KEYS, SERVING, Cell
from loradrop.testing import AWKWARD

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("cache")


# On a CPU, from the command to the file


def test_from_layers_to_the_file(cache: Path, capsys: Capsys) -> None:
    options = ("--device", "cpu", "--tokens", "5,24", "--rank", "4", "--seconds", 0)
    out = works(capsys, "tune", "16x12,12x24", *options)
    about, head, *lines = out.splitlines()
    assert "forward + backward, float32, in µs" in about
    assert head.split() == ["tokens", "K", "N", "r", "PEFT", *SERVING, "fastest"]
    rows = [line.split() for line in lines if line.split()[4:] and line.split()[0].isdigit()]
    layers = [["5", "16", "12"], ["24", "16", "12"], ["5", "12", "24"], ["24", "12", "24"]]
    assert [row[:4] for row in rows] == [[*layer, "4"] for layer in layers]
    assert all(float(row[4]) > 0 and float(row[5]) > 0 and row[-3] == "eager," for row in rows)
    assert out.count("cuda is left out: the extension loradrop._C is") == 1
    assert "plain PyTorch calls all the same" in out and f"wrote {cache / 'tuned-cpu.json'}" in out

    data = read_json(cache / "tuned-cpu.json")
    assert data["header"] == tuned.header("cpu") and len(data["points"]) == 4
    for point in data["points"]:
        assert set(point) == {*KEYS, "us", "host_us", "refused"}
        assert point["us"]["eager"] > 0 and (point["host_us"], point["refused"]) == ({}, {})
    assert [name.name for name in cache.iterdir()] == ["tuned-cpu.json"], "no draft is left"

    again = works(capsys, "tune", "16x12", *options, "--infer", "--dropout", "0.1")
    assert "forward, float32, dropout 0.1, in µs" in again
    points = read_json(cache / "tuned-cpu.json")["points"]
    assert len(points) == 6, "those of before are still there"
    assert sum((p["grad"], p["dropout"]) == (0, 1) for p in points) == 2
    works(capsys, "tune", "16x12", *options)
    assert len(read_json(cache / "tuned-cpu.json")["points"]) == 6, "replaced, not added"


def test_out_is_another_file(cache: Path, tmp_path: Path, capsys: Capsys) -> None:
    out = tmp_path / "there" / "points.json"
    works(capsys, "tune", "16x12", "--device", "cpu", "--tokens", 3, "--seconds", 0, "--out", out)
    assert len(read_json(out)["points"]) == 1 and not cache.exists()


def test_the_layers_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    folder = write_model(tmp_path / "base")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)  # no weight is read
    (d,) = {layer.k for layer in tuning.layers_to_tune(str(folder), None, None)[0]}
    assert tuning.layers_to_tune(str(folder), None, None) == ([(d, d, 16)], 0.0)
    every, _ = tuning.layers_to_tune(str(folder), (2, 4), "all-linear")
    assert len(every) == len(set(every)) and {layer.r for layer in every} == {2, 4}
    assert {(d, d, 2), (d, d, 4)} < set(every)
    assert any(layer.k != layer.n for layer in every)
    named, _ = tuning.layers_to_tune(str(folder), (2,), "query,key")
    assert named == [(d, d, 2)]
    run = tmp_path / "run.yaml"
    run.write_text(f"{{model: {folder}, lora: {{r: 4, lora_dropout: 0.25, method: lora}}}}")
    assert tuning.layers_to_tune(str(run), None, None) == ([(d, d, 4)], 0.25)
    pattern = LoRAConfig(r=4, rank_pattern={"query": 2})
    assert set(tuning.layers_of_model(str(folder), [pattern])) == {(d, d, 2), (d, d, 4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("4096x", "the model '4096x' cannot be loaded"),
        ("4096x4096x4", "'4096x4096x4': write layers as KxN,KxN"),
        ("8x8 --tokens many", "--tokens 'many': write whole numbers as 1024,2048"),
        ("8x8 --rank 0", "--rank '0': write whole numbers"),
        ("8x8 --targets q_proj", "--targets 'q_proj' needs a model, and '8x8' names layers"),
        ("no/model --rank 8", "the model 'no/model' cannot be loaded"),
        ("8x8 --limit soon", "Invalid value for '--limit'"),
        ("8x8 --dropout 1.5", "dropout=1.5: choose 0, or a probability between"),
        ("8x8 --dropout -0.1", "dropout=-0.1: choose 0"),
        ("8x8 --dropout nan", "dropout=nan: choose 0"),
        ("8x8 --limit -1", "--limit -1: choose a positive number of seconds, such as 120"),
        ("8x8 --limit 0", "--limit 0: choose"),
        ("8x8 --limit inf", "--limit inf: choose"),
        ("8x8 --seconds -2", "--seconds -2: choose a number from 0 up, such as 1"),
        ("8x8 --seconds nan", "--seconds nan: choose"),
    ],
)
def test_what_is_wrong_is_named(arguments: str, message: str, cache: Path, capsys: Capsys) -> None:
    status, _, err = command(capsys, "tune", *arguments.split())
    assert status == 2 and message in err and "Traceback" not in err
    assert not cache.exists()


def test_out_replaces_nothing_but_a_file_of_its_own(tmp_path: Path, capsys: Capsys) -> None:
    line = ("tune", "16x12", "--device", "cpu", "--tokens", 3, "--seconds", 0, "--out")
    for name, text in {"run.yaml": "model: base\n", "a.json": '{"points": []}'}.items():
        (tmp_path / name).write_text(text)
        path = tmp_path / name
        fails(capsys, f"--out {path} is not a file that loradrop tune wrote", *line, path)
        assert (tmp_path / name).read_text() == text
    fails(capsys, f"{tmp_path} is a folder: name a file, such as", *line, tmp_path)
    below = tmp_path / "run.yaml" / "points.json"
    fails(capsys, f"{below} cannot be written (", *line, below)
    out = tmp_path / "points.json"
    old = {"schema": 1, "header": tuned.header("cpu") | {"torch": "1.0"}, "points": [POINT]}
    out.write_text(json.dumps(old))
    said = works(capsys, *line, out)
    assert f"{out} was measured on something else (torch was 1.0, is " in said
    assert said.count("): what it holds is replaced\n") == 1
    assert [point["k"] for point in read_json(out)["points"]] == [16]
    assert "is replaced" not in works(capsys, *line, out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(capsys: Capsys) -> None:
    fails(
        capsys,
        "--device cuda: PyTorch finds no CUDA device here",
        "tune",
        "8x8",
        "--device",
        "cuda",
    )


# The check


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_timed_computes_the_layer(dtype: str, dropout: float) -> None:
    case = make_case(Cell(dtype, 40, 64, 96, 4, dropout, BACKWARD), "cpu").widened()
    assert case.A.dtype == torch.float32 and case.x.dtype == getattr(torch, dtype)
    for backward in (False, True):
        correct.check_backend(case, "eager", backward)
    if not dropout:  # its mask is another
        correct.compare(correct.results(case, as_peft(case), True), case, norm=False)


@pytest.mark.parametrize("what", ["y", "dx", "dA", "dB", "sqnorm", "no norm", "nan", "zero"])
def test_what_is_off_is_named(what: str) -> None:
    case = make_case(Cell("float32", 40, 64, 96, 4, 0.0, BACKWARD), "cpu")
    found = correct.results(case, ours(case, norm=True, backend="eager"), True)
    correct.compare(found, case, norm=True)
    name = what if what in found else "sqnorm" if what == "no norm" else "y"
    value = found[name]
    assert value is not None
    bad = {"nan": value * float("nan"), "zero": torch.zeros_like(value), "no norm": None}
    found[name] = bad[what] if what in bad else value * 1.001
    with pytest.raises(
        AssertionError, match="norm nobody asked for" if what == "no norm" else name
    ):
        correct.compare(found, case, norm=True)


def test_the_check_holds_in_an_optimised_python() -> None:
    code = """
import torch
from loradrop.measuring import correct
from loradrop.measuring.cases import make_case, ours
from loradrop.op.points import BACKWARD, Cell
from loradrop.testing import assert_within

case = make_case(Cell("float32", 40, 64, 96, 4, 0.0, BACKWARD), "cpu")
found = correct.results(case, ours(case, norm=True, backend="eager"), True)
one, off = torch.ones(2), float(found["sqnorm"])
for name, check in {
    "y is missing": lambda: correct.compare(found | {"y": None}, case, norm=True),
    "y: relative error": lambda: correct.compare(found | {"y": found["y"] * 2}, case, norm=True),
    "a norm nobody": lambda: correct.compare(found, case, norm=False),
    "sqnorm: ": lambda: correct.compare(found | {"sqnorm": 2 * off}, case, norm=True),
    "shapes differ": lambda: assert_within(one[:1], one, one),
    "not finite": lambda: assert_within(one / 0, one, one),
}.items():
    try:
        check()
    except AssertionError as error:
        print(name in str(error), name)
"""
    done = subprocess.run(
        [sys.executable, "-O", "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.count("True") == 6 and "False" not in done.stdout, done.stdout


# Backends that fail

PLANTED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from dataclasses import replace
from loradrop.measuring import child
from loradrop.op import dispatch

EAGER = dispatch.BACKENDS["eager"]

def crash(call):
    os.kill(os.getpid(), signal.SIGSEGV)

def hang(call):
    time.sleep(60)

def wrong(call):
    found = EAGER.forward(call)
    return found._replace(y=found.y * 1.001)

def slow(call):
    time.sleep(4)
    return EAGER.forward(call)

def killed(call):
    os.kill(os.getpid(), signal.SIGKILL)

def large(call):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

def fault(call):
    raise RuntimeError("no such kernel")

def right(call):
    return EAGER.forward(call)

def for_wide_layers(call):
    return (crash if call.B.shape[0] > 12 else right)(call)

def of_peft(case):
    raise RuntimeError("no such layer")

for name, forward in {planted}.items():
    if name == "PEFT":
        child.as_peft = globals()[forward]
        continue
    planted = replace(EAGER, name=name, forward=globals()[forward])
    dispatch.BACKENDS[name] = planted
child.main()
"""


def tune(tmp_path: Path, layers: list[tuple[int, int]], **planted: str) -> tuple[list[Any], str]:
    """The points, and what is printed, where these backends are planted."""
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.format(root=str(ROOT), planted=planted))
    cells = [Cell("float32", 6, k, n, 4, 0.0, BACKWARD) for k, n in layers]
    printed: list[str] = []
    command = [sys.executable, str(script)]
    # A busy machine loads torch slowly.
    limit = 3.0 if {"hang", "slow"} & set(planted.values()) else 60.0
    path = tuning.tune(cells, "cpu", printed.append, seconds=0.0, limit=limit, command=command)
    assert path == tuned.path_of("cpu")
    return list(reversed(read_json(path)["points"])), "\n".join(printed)


def test_who_crashes_hangs_or_is_wrong_costs_the_others_nothing(tmp_path: Path) -> None:
    (point,), out = tune(tmp_path, [(16, 12)], thin="crash", triton="hang", cuda="wrong")
    assert set(point["us"]) == {"eager"}
    assert point["refused"]["thin"].startswith("its process ended with SIGSEGV")
    assert point["refused"]["triton"] == "gave no sign of life for 3 s and was stopped"
    assert point["refused"]["cuda"].startswith("wrong: y: relative error 0.001")
    row = next(line for line in out.splitlines() if line.split()[:3] == ["6", "16", "12"])
    assert row.split()[6:9] == ["failed"] * 3 and "eager" in row
    for name, why in point["refused"].items():
        assert f"{name} failed, and is not used for such layers: {why}" in out


def test_want_of_memory_is_nobodys_fault(tmp_path: Path) -> None:
    layers = [(16, 12), (16, 24), (16, 40)]
    points, out = tune(
        tmp_path, layers, thin="large", triton="killed", cuda="right", PEFT="of_peft"
    )
    assert [point["refused"] for point in points] == [{}] * 3
    assert [set(point["us"]) for point in points] == [{"eager", "cuda"}] * 3
    assert "thin is left out: out of memory" in out
    assert "triton has no time: its process was killed from outside, most likely for want" in out
    assert "PEFT is left out: RuntimeError: no such layer" in out
    begun: list[str] = []
    cell = Cell("float32", 10**13, 16, 12, 4, 0.0, BACKWARD)
    found = child.measure(cell, "cpu", 0.0, (), begun.append)
    assert found == ({}, {}, {}, {"": "out of memory"}) and begun == [""]
    tried = tuning._tried(cell, ("cpu",), found, {})
    assert tried.point is None and tried.notes == ("this layer is left out: out of memory",)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory, Required: 262144"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_want_of_memory(error: Exception, is_memory: bool) -> None:
    assert workers.out_of_memory(error) == is_memory


def test_the_truth_takes_nobodys_time(tmp_path: Path) -> None:
    (point,), _ = tune(tmp_path, [(16, 12)], reference="slow")
    assert point["refused"] == {} and set(point["us"]) == {"eager"}


def test_a_fault_of_one_layer(tmp_path: Path) -> None:
    """One that is lost twice is tried no more; one that raises is asked at every layer."""
    layers = [(16, 12), (16, 24), (16, 40), (16, 8)]
    points, out = tune(tmp_path, layers, thin="for_wide_layers", triton="fault", cuda="right")
    first, second, third, fourth = points
    assert set(first["us"]) == {"eager", "thin", "cuda"}
    assert [set(p["us"]) for p in points[1:]] == [{"eager", "cuda"}] * 3
    assert {p["refused"]["triton"] for p in points} == {"RuntimeError: no such kernel"}
    assert "thin" not in first["refused"]
    assert second["refused"]["thin"] == third["refused"]["thin"] != fourth["refused"]["thin"]
    assert fourth["refused"]["thin"] == "it was lost at two layers before, and was not tried here"
    assert out.count("no such kernel") == 1, "each note once"


def test_a_cpu_that_computes_wrongly_gets_the_reference(tmp_path: Path, capsys: Capsys) -> None:
    t = draw(AWKWARD["rank 4"])  # 37 x 31 -> 17
    assert dispatch.serving(call_of(t), None).name == "eager"
    points, _ = tune(tmp_path, [(31, 17)], eager="wrong")
    assert set(points[0]["refused"]) == {"eager"} and points[0]["us"] == {}
    with pytest.warns(UserWarning, match=r"backend eager failed in loradrop tune.*tuned-cpu\.json"):
        assert dispatch.serving(call_of(t), None).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.serving(call_of(draw(AWKWARD["rank 4"])), None).name == "reference"
        assert dispatch.serving(call_of(draw(AWKWARD["rank 8"])), None).name == "eager"
        assert dispatch.serving(call_of(t), "eager").name == "eager", "named, so asked for"
    if not torch.cuda.is_available():
        layer = ("--layer", "500x31x17", "--rank", 4, "--dtype", "float32")
        out = works(capsys, "env", *layer)
        assert (
            "reference: a CPU runs plain PyTorch calls; not eager, which failed here: wrong" in out
        )


def test_env_says_what_was_tuned(tmp_path: Path, monkeypatch: Any, capsys: Capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nothing on cpu: loradrop tune measures your model's layers" in works(capsys, "env")
    tune(tmp_path, [(16, 12), (16, 24)], thin="right")
    assert f"2 layers of cpu in {tuned.path_of('cpu')}" in works(capsys, "env")
    out = works(capsys, "env", "--layer", "7x16x12", "--rank", 4, "--dtype", "float32")
    assert "this CPU (--chip names a GPU)" in out
    assert "eager: a CPU runs plain PyTorch calls, by loradrop tune in µs: eager " in out
    assert out.count("by loradrop tune") == 1, "only training was measured"


def test_a_child_leaves_out_what_would_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("bfloat16", 8192, 4096, 4096, 16, 0.1, BACKWARD)
    assert child._why_left_out("eager", cell, "cpu") is None
    monkeypatch.setattr(child, "machine_of", lambda _: Machine(90, 132, H200))
    assert "thousands of launches" in str(child._why_left_out("eager", cell, "cuda"))
    assert child._why_left_out("eager", cell._replace(dropout=0.0), "cuda") is None
