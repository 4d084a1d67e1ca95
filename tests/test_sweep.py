"""Many decisions from one plan: what each keeps, what that costs, and what cannot be decided."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import loradrop
from loradrop import LoRAConfig, LoRADrop
from loradrop.command.cli import main
from loradrop.methods import LoRA, Spectral
from loradrop.plan import Plan
from loradrop.report.sweep import scores_of, sweep, sweep_table
from loradrop.scores import Assignment, Scores, Target
from loradrop.selection import assign

K, N, R = 16, 16, 2
VALUES = [4.0, 1.0, 3.0, 2.0, 40.0, 10.0, 30.0, 20.0]
TARGETS = tuple(Target(f"layers.{i % 4}.{'qv'[i // 4]}", "qv"[i // 4], K, N, R) for i in range(8))
EACH = R * (K + N)


def plan(method: Any = None, values: Any = VALUES, **fields: Any) -> Plan:
    scores = {"source": "online", "tokens": 99, "rows": 5}
    scores["values"] = dict(zip([t.name for t in TARGETS], values, strict=True))
    config = LoRAConfig(r=R, target_modules=["q", "v"], method=method or LoRADrop(threshold=0.7))
    assignment = assign(TARGETS, ["layers.0.q"])
    made = Plan(config=config, assignment=assignment, parameters=0, scores=scores)
    return dataclasses.replace(made, **fields)


def test_a_row_for_each_value() -> None:
    """Of 10 and of 100: 40 % are one target of each type, 70 % two, 71 % three."""
    found = sweep(plan(), [0.4, 0.7, 0.71, 0.0, 1.0], [0.5])
    assert [len(d.assignment.kept or ()) for d in found] == [2, 4, 6, 0, 8, 2]
    adapters = [4, 6, 8, 2, 8, 4]
    assert [d.assignment.adapters for d in found] == adapters
    assert [d.assignment.parameters for d in found] == [n * EACH for n in adapters]
    assert [d.part for d in found] == [n / 8 for n in adapters]
    assert found[0].assignment.kept == ("layers.0.q", "layers.0.v")


def test_it_decides_as_select_does() -> None:
    rows = torch.tensor([VALUES], dtype=torch.float64)
    scores = Scores(TARGETS, rows, 99, "online")
    options = {"scope": "joint", "importance": "root"}
    for decision in sweep(plan(LoRADrop(keep=3, **options)), [0.3, 0.6, 0.9], [0.4, 0.9]):
        given = {decision.option: decision.value}
        assert list(decision.assignment.kept or ()) == loradrop.select(scores, **given, **options)


def test_the_plans_own_way_to_share() -> None:
    none, interval = (LoRADrop(share=how, interval=2) for how in ("none", "interval"))
    assert sweep(plan(none), [0.4])[0].assignment.adapters == 2
    assert sweep(plan(interval), [0.4])[0].assignment.adapters == 2 + 4
    inverse = sweep(plan(LoRADrop(selection="inverse")), [0.4])[0].assignment.kept
    assert inverse == ("layers.1.q", "layers.1.v")


def test_of_another_method_it_takes_the_ranks_before_a_cut() -> None:
    cut = {"full": {t.name: 2 * R for t in TARGETS}, "metric": "loss", "loss": None}
    spectral = plan(Spectral(), cut=cut)
    assert sweep(spectral, [0.4])[0].assignment.parameters == 4 * 2 * EACH
    assert [t.r for t in scores_of(spectral).targets] == [2 * R] * 8


def test_the_table() -> None:
    lines = sweep_table(plan(), [0.7], [0.5]).splitlines()
    assert lines[0].split() == ["kept", "adapters", "parameters", "of", "LoRA's"]
    assert lines[1].split() == ["threshold", "0.7", "4", "of", "8", "6", f"{6 * EACH}", "75", "%"]
    assert lines[2].split() == ["budget", "0.5", "2", "of", "8", "4", f"{4 * EACH}", "50", "%"]
    assert len(sweep_table(plan()).splitlines()) == 8


def test_what_cannot_be_decided() -> None:
    without = plan(LoRA(), scores=None, assignment=Assignment(TARGETS, tuple(range(8))))
    with pytest.raises(ValueError, match=r"no scores.*method 'lora' made none.*lora_drop"):
        sweep(without, [0.5])
    with pytest.raises(ValueError, match=r"threshold=1\.5: choose a number in \[0, 1\]"):
        sweep(plan(), [1.5])
    with pytest.raises(ValueError, match=r"budget=-1\.0: choose"):
        sweep(plan(), [], [-1.0])
    with pytest.raises(ValueError, match=r"layers\.0\.q is nan"):
        sweep(plan(values=[None, *VALUES[1:]]), [0.5])
    scores = {"source": "online", "tokens": 1, "rows": 1, "values": {"layers.0.q": 1.0}}
    with pytest.raises(ValueError, match=r"no score of layers\.1\.q"):
        sweep(plan(scores=scores), [0.5])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan().to_dict()))

    def said(*options: str) -> tuple[int, str, str]:
        status = main(["plan", *options])
        return (status, *capsys.readouterr())

    asked = ("--thresholds", "0.4,0.7", "--budgets", "0.5")
    assert said("sweep", str(path), *asked) == (
        0,
        sweep_table(plan(), [0.4, 0.7], [0.5]) + "\n",
        "",
    )
    assert said("sweep", str(tmp_path)) == (0, sweep_table(plan()) + "\n", "")
    status, _, err = said("sweep", str(path), "--thresholds", "0.4;0.7")
    assert status == 2 and "--thresholds 0.4;0.7: give numbers like 0.5,0.7,0.9" in err
    status, _, err = said("show", str(path), "--budgets", "0.5")
    assert status == 2 and "--thresholds and --budgets are of loradrop plan sweep" in err
    path.write_text(json.dumps(plan(LoRA(), scores=None).to_dict()))
    status, _, err = said("sweep", str(path))
    assert status == 2 and "the plan has no scores" in err
