"""The file of `loradrop tune`, and what the dispatcher makes of it and of a device's name."""

import dataclasses
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import call_of, draw

from loradrop.op import costs, dispatch, tuned
from loradrop.op.call import Problem
from loradrop.op.points import KEYS, SERVING
from loradrop.testing import AWKWARD

ROOT = Path(__file__).resolve().parent.parent
H200 = "NVIDIA H200"
LLAMA_Q = Problem(
    "cuda", torch.bfloat16, 8192, 4096, 4096, 16, 0.0, arch=90, sms=132, device_name=H200
)
POINT: dict[str, Any] = {  # of LLAMA_Q
    **{"device": H200, "arch": 90, "sms": 132, "dtype": "bfloat16", "k": 4096, "n": 4096},
    **{"m": 8192, "r": 16, "dropout": 0, "grad": 1},
    **{"us": {"eager": 900.0, "thin": 800.0, "triton": 700.0}, "host_us": {}, "refused": {}},
}
HERE = {
    "device": H200,
    "driver": "580",
    "loradrop": "1",
    "torch": "2",
    "triton": "3",
    "kernels": "a",
}
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were a machine with an H200, where everything but the CUDA kernels runs."""
    monkeypatch.setattr(dispatch, "triton_missing", lambda: None)
    monkeypatch.setattr(tuned, "header", lambda device: HERE | {"device": device})
    for name in ("thin", "triton"):
        runs = dataclasses.replace(dispatch.BACKENDS[name], missing=lambda: None)
        monkeypatch.setitem(dispatch.BACKENDS, name, runs)


def write(*points: dict[str, Any], **changed: Any) -> None:
    """The file of the H200, whose header is that of this machine but for what is changed."""
    tuned.write(tuned.path_of(H200), tuned.header(H200) | changed, points)
    dispatch.forget()


# The file and the dispatcher


@pytest.mark.usefixtures("h200")
def test_own_points_outrank_shipped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {key: POINT[key] for key in (*KEYS, "us")} | {"us": {"eager": 1.0, "thin": 2.0}}
    monkeypatch.setattr(costs, "measurements", lambda: (shipped,))
    dispatch.forget()
    assert dispatch.choose(LLAMA_Q) == "eager"
    write(POINT | {"m": 6000})  # farther, but of this machine
    assert dispatch.choose(LLAMA_Q) == "triton"
    assert dispatch.explain(LLAMA_Q) == (
        "triton: by loradrop tune at 6000 tokens, in µs: eager 900, thin 800, triton 700"
    )
    for change in ({"m": 500}, {"k": 512}, {"grad": False}, {"dropout": 0.1}):
        other = LLAMA_Q._replace(**change)
        assert dispatch.choose(other) == costs.choose_predicted(other), "it holds for its own layer"
    other = LLAMA_Q._replace(device_name="NVIDIA H100 80GB HBM3")
    assert dispatch.choose(other) == costs.choose_predicted(other), "and its own device"
    named = LLAMA_Q._replace(device_name="")
    assert dispatch.choose(named) == "eager", "a chip of which only the kind is known: the shipped"
    write(POINT | {"us": {}, "refused": {"triton": "wrong"}})
    with pytest.warns(UserWarning, match="triton failed"):
        assert dispatch.choose(LLAMA_Q) == "eager", "nothing was timed: the shipped point"


@pytest.mark.usefixtures("h200")
def test_the_host_counts_where_it_takes_longer() -> None:
    write(POINT | {"host_us": {"eager": 300.0, "thin": 850.0, "triton": 960.0}})
    assert dispatch.choose(LLAMA_Q) == "thin"
    assert dispatch.explain(LLAMA_Q).endswith(
        "eager 900, thin 800 (host 850), triton 700 (host 960)"
    )
    write(POINT | {"host_us": {"eager": 300.0, "thin": 990.0, "triton": 960.0}})
    assert dispatch.choose(LLAMA_Q) == "eager"


@pytest.mark.usefixtures("h200")
def test_who_failed_is_never_chosen() -> None:
    failed = POINT | {"us": {"eager": 9.0}, "refused": {"thin": "wrong: y", "cuda": "SIGSEGV"}}
    write(failed, POINT | {"m": 2048, "us": {"eager": 900.0, "thin": 1.0, "triton": 700.0}})
    with pytest.warns(UserWarning) as warned:
        assert dispatch.choose(LLAMA_Q) == "eager"
        for change in ({"m": 2048}, {"m": 2048, "r": 8}):  # thin is fastest there by its time
            assert dispatch.choose(LLAMA_Q._replace(**change)) == "triton"
    assert len(warned) == 2, "each once"
    assert all(name in str(w.message) for name, w in zip(("thin", "cuda"), warned, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for change in ({"m": 100}, {"grad": False}, {"base": False}, {"aligned": False}):
            assert dispatch.choose(LLAMA_Q._replace(**change)) == "eager", "nor by a guess"
        masked = LLAMA_Q._replace(dropout=0.1)
        assert dispatch.choose(masked) == "thin", "another kernel"
    explained = dispatch.explain(LLAMA_Q)
    assert "; not thin, which failed here: wrong: y; not cuda, which failed here: SIGS" in explained
    everyone = dict.fromkeys(SERVING, "wrong")
    write(POINT | {"us": {}, "refused": everyone})
    with pytest.warns(UserWarning, match="eager failed"):
        assert dispatch.choose(LLAMA_Q) == "reference"
    write(POINT | {"us": {}, "refused": {"eager": "wrong", "thin": "wrong"}})
    assert dispatch.choose(LLAMA_Q) == "triton", "rather than the reference"


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("field", HERE)
def test_a_file_of_another_machine_is_refused_and_said_once(field: str) -> None:
    slow = POINT | {"us": {"eager": 1.0, "thin": 9e6}}
    masked = LLAMA_Q._replace(dropout=0.1)
    write(slow | {"dropout": 1})
    assert dispatch.choose(masked) == "eager"
    write(slow | {"dropout": 1, "refused": {"thin": "wrong"}}, **{field: "another"})
    with pytest.warns(
        UserWarning, match=f"{field} was another, is .*: run loradrop tune"
    ) as warned:
        assert dispatch.choose(masked) == "thin"
        assert dispatch.choose(masked._replace(m=100)) == "thin"
    assert len(warned) == 1
    assert f"({field} was another" in dispatch.explain(masked)
    write(slow | {"dropout": 1}, unknown="a field of a later version")
    with pytest.warns(UserWarning, match="unknown was a field of a later version, is none"):
        assert dispatch.choose(masked) == "thin"


BROKEN = {
    "half": '{"schema": 1, "head',
    "a list": "[]",
    "schema": '{"schema": 2}',
    "no points": '{"schema": 1, "header": {}}',
    "a point": '{"schema": 1, "header": {}, "points": [{"k": 1}]}',
    "no header": '{"schema": 1, "header": null, "points": []}',
    "nested": "[" * 100_000,
}


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_stops_nobody(text: str) -> None:
    path = tuned.path_of(H200)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"tuned-nvidia-h200\.json .*run loradrop tune again"):
        assert dispatch.choose(LLAMA_Q) == costs.choose_predicted(LLAMA_Q)
    tuned.write(path, tuned.header(H200), [POINT])
    dispatch.forget()
    assert dispatch.choose(LLAMA_Q) == "triton", "written over"


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(
    "wrong",
    [
        {"refused": None},
        {"refused": {"thin": None}},
        {"us": {"eager": "9"}},
        {"us": [9.0]},
        {"host_us": {"eager": None}},
        {"m": 0},
        {"r": "16"},
        {"dtype": None},
    ],
)
def test_a_point_that_nobody_wrote_stops_nobody(wrong: dict[str, Any]) -> None:
    write(POINT | wrong)
    with pytest.warns(UserWarning, match=rf"cannot be read \(TypeError.*{next(iter(wrong))} of "):
        assert dispatch.choose(LLAMA_Q) == costs.choose_predicted(LLAMA_Q)


def test_a_cache_that_may_not_be_read_stops_nobody(cache: Path) -> None:
    def denied(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    t = draw(AWKWARD["rank 4"])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stat", "read_text"):
            patch.setattr(Path, name, denied)
        file = tuned.of_device(tuned.CPU)
    assert file.points == () and "set XDG_CACHE_HOME to a folder of your own" in str(file.why_not)
    with pytest.warns(UserWarning, match=r"tuned-cpu\.json cannot be read \(PermissionError"):
        assert dispatch.serving(call_of(t), None).name == "eager"
    cache.write_text("a file where the folder should be")
    dispatch.forget()
    assert tuned.of_device(tuned.CPU) == (tuned.path_of(tuned.CPU), (), None), "as without a cache"


def test_a_write_that_fails_leaves_the_old_file(cache: Path, monkeypatch: Any) -> None:
    write(POINT)
    before = tuned.path_of(H200).read_bytes()
    monkeypatch.setattr(os, "replace", _no_space)
    with pytest.raises(OSError, match="no space"):
        write(POINT | {"m": 1})
    assert tuned.path_of(H200).read_bytes() == before and len(list(cache.iterdir())) == 1


def _no_space(*_: Any) -> None:
    raise OSError("no space")


def test_where_the_file_lies_and_what_it_depends_on(tmp_path: Path) -> None:
    code = "from loradrop.op import tuned; print(tuned.path_of('NVIDIA H100 80GB HBM3'))"
    for variables, folder in (
        ({"XDG_CACHE_HOME": str(tmp_path)}, tmp_path),
        ({"XDG_CACHE_HOME": "", "HOME": str(tmp_path)}, tmp_path / ".cache"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == str(folder / "loradrop/tuned-nvidia-h100-80gb-hbm3.json")
    here = tuned.header("cpu")
    assert here["torch"].startswith(torch.__version__.partition("+")[0]) and here["device"]
    assert re.fullmatch("[0-9a-f]{16}", here["kernels"])


def test_the_hash_is_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "loradrop"
    for name in ("kernels/shrink", *(f"op/{name}" for name in ("tuned", *tuned._SOURCES))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").write_text(name)
    monkeypatch.setattr(tuned, "__file__", str(root / "op" / "tuned.py"))

    def now() -> str:
        return tuned.kernels_hash.__wrapped__()

    seen = [now()]
    for change in ("kernels/shrink.py", "kernels/new.py", "op/fused.py", "_C.so"):
        (root / change).write_text("another")
        seen.append(now())
    assert len(set(seen)) == 5
    (root / "op" / "costs.py").write_text("another")
    assert now() == seen[-1]


# Devices by their names

NAMES = {
    "NVIDIA GeForce RTX 4090": (165.2, 1.008),
    "NVIDIA GeForce RTX 3090": (71, 0.936),
    "NVIDIA GeForce RTX 3090 Ti": (80, 1.008),
    "NVIDIA GeForce RTX 5090": (209.5, 1.792),
    "NVIDIA L4": (121, 0.3),
    "NVIDIA L40S": (362, 0.864),
    "NVIDIA A100-SXM4-40GB": (312, 1.555),
    "NVIDIA A100-SXM4-80GB": (312, 2.039),
    "NVIDIA A100 80GB PCIe": (312, 1.935),
    "NVIDIA H20": (148, 4.0),
    "NVIDIA H100 80GB HBM3": (989, 3.35),
    "NVIDIA H100 PCIe": (756, 2.0),
    "NVIDIA H200": (989, 4.8),
    "NVIDIA B200": (2250, 8.0),
}


@pytest.mark.parametrize("name", NAMES)
def test_rates_by_name(name: str) -> None:
    tera_flops, tera_bytes = NAMES[name]
    rate = costs.rates(90, 132, name)
    assert rate.flops == pytest.approx(0.8e12 * tera_flops)
    assert rate.bytes == pytest.approx(0.9e12 * tera_bytes)


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "GH200", ""]
)
def test_rates_of_a_part_of_a_chip_are_those_of_its_family(name: str) -> None:
    assert costs.rates(90, 20, name) == costs.rates(90, 20)


def test_families_of_geforce_are_near_their_chips() -> None:
    for arch, sms, name in ((86, 82, "RTX 3090"), (89, 128, "RTX 4090"), (120, 170, "RTX 5090")):
        known, family = costs.rates(arch, sms, name), costs.rates(arch, sms)
        assert family.flops == pytest.approx(known.flops, rel=0.05)
        assert family.bytes == pytest.approx(known.bytes, rel=0.05)
