"""The command as its tests call it, and a folder with a run that it made."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_cases import write_model, write_table

from loradrop.command.cli import main

Capsys = pytest.CaptureFixture[str]


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


def command(capsys: Capsys, *arguments: Any) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `loradrop` with these arguments."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def works(capsys: Capsys, *arguments: Any) -> str:
    """stdout of `loradrop` with these arguments, which do not fail."""
    status, out, err = command(capsys, *arguments)
    assert status == 0, err
    return out


def fails(capsys: Capsys, message: str, *arguments: Any) -> str:
    """stderr of `loradrop` with these arguments, which is an error with this message."""
    status, out, err = command(capsys, *arguments)
    assert (status, out) == (2, "") and message in err.partition("loradrop: error: ")[2], err
    return err


def python(*arguments: Any) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of an interpreter of its own."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()
