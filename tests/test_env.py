"""`loradrop env`: the versions, the devices, and why the op chooses a backend for a layer."""

from types import SimpleNamespace

import pytest
import torch
from cli_cases import Capsys, python, works

import loradrop
from loradrop.command import env
from loradrop.op import cuda


def test_env_and_version(capsys: Capsys) -> None:
    out = works(capsys, "env")
    assert loradrop.__version__ in out and torch.__version__.partition("+")[0] in out
    version = f"loradrop {loradrop.__version__}\n"
    for arguments in (["--version"], ["--version", "env"]):
        assert python("-m", "loradrop", *arguments) == (0, version, "")


def test_env_says_how_many_clusters_a_device_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    facts = env.report()
    gpu = SimpleNamespace(name="H", major=9, minor=0, total_memory=80 << 30)
    with monkeypatch.context() as machine:
        machine.setattr(torch.cuda, "is_available", lambda: True)
        machine.setattr(torch.cuda, "device_count", lambda: 2)
        machine.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        machine.setattr(cuda, "occupancy", lambda device: {} if device else {2: 66, 8: 15})
        facts["cuda"] = env._cuda()
    monkeypatch.setattr(env, "report", lambda: facts)
    out = works(capsys, "env")
    assert "H, sm 9.0, 80.0 GiB, 66 clusters of 2, 15 clusters of 8\n" in out
    assert "H, sm 9.0, 80.0 GiB\n" in out


def test_env_explains_a_choice(capsys: Capsys) -> None:
    layer = ("--layer", "8192x4096x4096", "--rank", "64", "--dropout", "0.1")
    out = works(capsys, "env", *layer, "--chip", "90:132")
    first, *choices = out.splitlines()
    assert "8192 tokens, 4096 to 4096, rank 64, dropout 0.1, bfloat16, sm_90 x 132" in first
    assert [line.split()[0] for line in choices] == ["forward", "forward"]
    assert all("measured" in line and ", in µs: " in line for line in choices)


def test_env_says_which_timed_kernels_are_not_here(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "missing", lambda: "the extension loradrop._C is not built: x")
    line = ("env", "--layer", "8192x4096x4096", "--chip", "90:132")
    _, both, _ = works(capsys, *line).splitlines()
    timed = [name for name in ("cuda", "overlap") if f" {name} " in both.partition("in µs:")[2]]
    assert timed and "do not run here: the extension loradrop._C is not built: x" in both
    assert f"; {' and '.join(timed)} do" in both
    monkeypatch.setattr(cuda, "missing", lambda: None)
    assert "not run here" not in works(capsys, *line)
