"""Files are whole or not there, whatever the disk, the system or another program does meanwhile."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import bert, fill, llama
from native_cases import adapt, loaded, model, path, same
from safetensors import SafetensorError
from torch import nn

import loradrop
from loradrop import tensor_file
from loradrop.files import create_json, read_json, write_json
from loradrop.native import TENSORS, read

__all__ = ["model", "path"]  # fixtures


class TestAtomic:
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_failing_save_leaves_the_last_one(
        self, call: str, model: Any, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: Any) -> None:
            raise OSError("no space left on device")

        before = {file.name: file.read_bytes() for file in path.iterdir()}
        monkeypatch.setattr(os, call, full)
        with pytest.raises(OSError, match="no space left"):
            loradrop.save(fill(model, 3), path)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before

    def test_killed_while_it_saves(self, tmp_path: Path) -> None:
        code = f"""
import itertools, torch, loradrop
from torch import nn
model = nn.Sequential(nn.Linear(400, 400))
loradrop.inject(model, loradrop.LoRAConfig(r=200, target_modules=["0"]))
for step in itertools.count():
    for parameter in model.lora_bank.parameters():
        parameter.data.fill_(step)
    loradrop.save(model, {str(tmp_path)!r})
    print(step, flush=True)
"""
        command, seen = [sys.executable, "-c", code], -1
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while seen < 5:
                seen = int(process.stdout.readline())
            process.kill()
            seen = max([seen, *map(int, process.stdout.read().split())])
        model = nn.Sequential(nn.Linear(400, 400))
        bank = loradrop.load(model, tmp_path)
        values = {float(value) for p in bank.parameters() for value in p.detach().aminmax()}
        assert values in ({float(seen)}, {float(seen + 1)})  # of one step, the last or the next

    def test_a_flush_that_wants_to_write(
        self, model: Any, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on Windows, where a file that is open to read alone is not flushed."""
        flush = os.fsync

        def fsync(handle: int) -> None:
            if stat.S_ISREG(os.fstat(handle).st_mode):
                os.write(handle, b"")  # raises for one that is open to read alone
            flush(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        loradrop.save(fill(model, 3), path)
        assert same(loaded(path), model)

    def test_a_file_that_another_program_holds(
        self, model: Any, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def held(*_: Any) -> None:
            raise PermissionError(13, "Access is denied")

        before = {file.name: file.read_bytes() for file in path.iterdir()}
        monkeypatch.setattr(os, "replace", held)
        with pytest.raises(PermissionError, match=rf"{TENSORS} cannot be replaced .*close what"):
            loradrop.save(fill(model, 3), path)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before

    def test_a_full_disk_has_one_sentence(
        self, model: Any, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(tensor_file, "save_file", full)
        with pytest.raises(OSError, match=r"cannot be written.*No space left.*Is the disk full"):
            loradrop.save(model, path)


@pytest.mark.parametrize("name", ["posix", "nt"])
def test_folders_are_flushed_where_they_can_be_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows opening a folder is a PermissionError."""
    opened: list[str] = []

    def refuse(path: Any, *_: Any) -> int:
        opened.append(str(path))
        raise PermissionError(path)

    monkeypatch.setattr("loradrop.files.os", SimpleNamespace(**{**vars(os), "name": name}))
    monkeypatch.setattr("loradrop.files.os.open", refuse)
    if name == "nt":
        write_json(tmp_path / "a.json", {"a": 1})
        assert read_json(tmp_path / "a.json") == {"a": 1} and not opened
    else:
        with pytest.raises(PermissionError):
            write_json(tmp_path / "a.json", {"a": 1})
        assert opened == [str(tmp_path)]


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such modes")
def test_files_can_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    """An adapter is trained by one user and served by another."""
    before = os.umask(0o022)
    try:
        loradrop.save(model := adapt(llama()), tmp_path / "native")
        loradrop.export(model, tmp_path / "peft")
    finally:
        os.umask(before)
    files = [*(tmp_path / "native").iterdir(), *(tmp_path / "peft").iterdir()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_flushes_no_folder(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some that are mounted from elsewhere; that a disk fails is told."""
    fsync, flushed = os.fsync, []

    def refuse(file: int) -> None:
        if not stat.S_ISDIR(os.fstat(file).st_mode):
            return fsync(file)
        flushed.append(file)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_json(tmp_path / "a.json", {"a": 1})
    else:
        write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    for folder in flushed:  # it is closed in any case
        with pytest.raises(OSError):
            os.fstat(folder)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_made_once_and_whole(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a file system without links."""

    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", link)
    file = tmp_path / "folder" / "a.json"
    create_json(file, {"a": 1})
    with pytest.raises(FileExistsError):
        create_json(file, {"a": 2})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space")))
        create_json(file.with_name("b.json"), {})
    assert [(f.name, read_json(f)) for f in file.parent.iterdir()] == [("a.json", {"a": 1})]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux for its open files")
def test_a_file_that_was_read_can_be_replaced(tmp_path: Path) -> None:
    """On Windows one that is mapped cannot."""
    loradrop.save(adapt(bert()), tmp_path)
    found = read(tmp_path)
    assert found.bank and str(tmp_path) not in Path("/proc/self/maps").read_text()
