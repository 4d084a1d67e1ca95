"""The examples run, by `--tiny`, and leave an adapter that trained; the notebook runs too."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import loradrop
from loradrop.injection import plan_of

datasets = pytest.importorskip("datasets")
ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def require_half(model: Any) -> None:
    """It shares within half of LoRA's parameters, and what is left has trained."""
    plan, bank = plan_of(model), model.lora_bank
    assert plan.assignment.shares and plan.kept
    assert plan.parameters <= plan.full_parameters / 2
    assert all(B.abs().max() > 0 for B in bank.B)


@pytest.mark.parametrize(
    ("script", "auto"),
    [
        ("classification", AutoModelForSequenceClassification),
        ("sft_trl", AutoModelForCausalLM),
    ],
)
def test_a_script(script: str, auto: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script == "sft_trl":
        pytest.importorskip("trl")
    command = [script, "--tiny", "--epochs", "2", "--out", "out"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    (checkpoint,) = here.glob("out/checkpoint-*")
    model = auto.from_pretrained(here / "out" / "tiny")
    loradrop.load(model, checkpoint)
    require_half(model)
    loradrop.export(model, here / "peft")  # what the script's own text says to do with it
    assert (here / "peft" / "adapter_config.json").exists()


def test_two_processes(here: Path) -> None:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(here / "home")}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    command = [str(EXAMPLES / "two_processes.sh"), "--tiny", "--out", "out"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    model = AutoModelForSequenceClassification.from_pretrained(here / "out" / "tiny" / "0")
    loradrop.load(model, here / "out" / "adapter")
    require_half(model)


def test_the_notebook(minilm_path: Path, here: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "quick_start.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "clear the outputs"
    resources = {"metadata": {"path": str(here)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    said = [str(output) for cell in code for output in cell.outputs]
    assert any("keep theirs" in text for text in said)
    assert any("peft       takes it" in text for text in said)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


def test_the_words_of_the_tiny_models(here: Path) -> None:
    """No row holds a word that the tokenizer does not know."""
    import tiny

    words = tiny.tokenizer()
    lines = tiny.reviews(here / "r.csv", 20, 3).read_text().split("\n")[1:]
    rows = [line.rpartition(",")[0] for line in lines]
    lines = tiny.answers(here / "a.jsonl", 20, 3).read_text().split("\n")
    rows += [text for line in lines for text in json.loads(line).values()]
    ids = words(" ".join(rows))["input_ids"]
    assert len(ids) > 300 and words.unk_token_id not in ids
