"""Training ends the same after a kill at any moment, and from whatever a kill leaves behind."""

import json
import logging
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs as tiny
from safetensors.torch import load_file
from torchrun import forking
from training_runs import At, counting, interrupted, make_model, make_rows, outcome, run, stop
from transformers import EarlyStoppingCallback, TrainingArguments

import loradrop
from loradrop import fit, native
from loradrop.files import read_json, write_json
from loradrop.text.tokens import TokenizedDataset
from loradrop.training import checkpoints, run_folder, stages, trainer
from loradrop.training import fit as training
from loradrop.training.run_folder import OPTIONS

# --- killed at any moment ---------------------------------------------------------------------

Moment = tuple[str, int] | tuple[Any, str, str] | tuple[Any, str, str, int]
MOMENTS: dict[str, Moment] = {  # after a step of a stage, or at a call with a path
    "before the first checkpoint": ("warmup", 3),
    "in the warm-up": ("warmup", 6),
    "a checkpoint of the warm-up": (trainer.LoRATrainer, "_save_rng_state", "warmup/checkpoint-8"),
    "between warm-up and start": (run_folder, "save", "start"),
    "writing start": (native, "write_json", "start/plan.json"),
    "before the first checkpoint of main": ("main", 2),
    "a checkpoint of main": (checkpoints, "write_json", "main/checkpoint-8/complete.json"),
    "replacing a file of main": (os, "replace", "checkpoint-8/adapter.safetensors", 2),
    "in the main run": ("main", 11),
    "after the last step": ("main", tiny.TOTAL - tiny.WARMUP),
    "before the result": (stages, "save", "adapter"),
}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(owner: Any, name: str, ending: str, number: int = 1) -> None:
    """Kill at the so-and-so-many-th call of `owner.name` whose last path part ends so."""
    original, calls = getattr(owner, name), Counter[str]()

    def spied(*args: Any, **kwargs: Any) -> Any:
        paths = [str(arg) for arg in args if isinstance(arg, (str, Path))]
        calls["hits"] += any(path.endswith(ending) for path in paths)
        if calls["hits"] == number:
            kill()
        return original(*args, **kwargs)

    setattr(owner, name, spied)


def doomed(folder: Path, moment: str, name: str) -> None:
    torch.set_num_threads(1)
    where, *more = MOMENTS[moment]
    if isinstance(where, str):
        run(folder, tiny.CONFIGS[name], callbacks=[At(where, *more, kill)])
    else:
        kill_at_call(where, *more)
        run(folder, tiny.CONFIGS[name])


def killed_and_resumed(folder: Path, moment: str, name: str) -> dict[str, Any]:
    """What the run of this name comes to."""
    process = forking().Process(target=doomed, args=(folder, moment, name))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    run(folder, tiny.CONFIGS[name], resume=True)
    return outcome(folder)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(moment: str, whole: Path, tmp_path: Path) -> None:
    assert killed_and_resumed(tmp_path, moment, "drop") == outcome(whole)


CUT = "between warm-up and start", "before the first checkpoint of main", "in the main run"


@pytest.mark.parametrize("moment", CUT)
def test_spectral_killed_and_resumed(moment: str, runs: tiny.Runs, tmp_path: Path) -> None:
    """What the optimiser knew before the cut is there again, from whichever file."""
    assert killed_and_resumed(tmp_path, moment, "spectral") == outcome(runs["spectral"][0])


# --- resuming what is not a plain checkpoint -----------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, Path], None]:
    """Copies what a run leaves that was stopped after a step of a stage; each is made once."""
    made = tmp_path_factory.mktemp("stopped")

    def copy(stage: str, step: int, to: Path) -> None:
        folder = made / f"{stage}-{step}"
        if not folder.exists():
            interrupted(folder, stage, step)
        shutil.copytree(folder, to, dirs_exist_ok=True)

    return copy


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


HALF = "{folder} was being written when the run ended; going on from an earlier"
DAMAGED, FILE = "{file} is damaged or half-written", "{folder} is damaged ({file.name})"
WARM_UP = "Going on from the warm-up's last checkpoint"
SPOILT: dict[str, tuple[Callable[[bytes], bytes] | None, list[str]]] = {
    "main/checkpoint-8/complete.json": (None, [HALF]),
    "warmup/checkpoint-4/optimizer.pt": (flipped, [FILE]),
    "warmup/checkpoint-4/adapter.safetensors": (flipped, [FILE]),
    "warmup/checkpoint-4/complete.json": (flipped, ["{folder} ", DAMAGED]),
    "warmup/checkpoint-4/rng_state.pth": (lambda content: content[:100], [FILE]),
    "start/adapter.safetensors": (lambda content: content[:200], [DAMAGED, WARM_UP]),
    "optimizer.pt": (flipped, ["{file} is damaged", WARM_UP]),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_damaged_is_named_and_made_again(
    name: str, whole: Path, stopped: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(*(("warmup", 7) if name.startswith("warmup") else ("main", 9)), tmp_path)
    file, (spoil, says) = tmp_path / name, SPOILT[name]
    content = file.read_bytes()
    file.unlink()
    if spoil:
        file.write_bytes(spoil(content))
    with caplog.at_level(logging.WARNING, "loradrop"):
        run(tmp_path, resume=True)
    for part in says:
        assert part.format(file=file, folder=file.parent) in caplog.text
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize("left", ["", "{"])
def test_damaged_options_are_named(left: str, stopped: Any, tmp_path: Path) -> None:
    stopped("warmup", 5, tmp_path)
    (tmp_path / OPTIONS).write_text(left)
    with pytest.raises(ValueError, match=r"options.json is damaged or half-written"):
        run(tmp_path, resume=True)
    with pytest.raises(ValueError, match="holds a run already"):
        run(tmp_path)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", ["", "{"])
def test_damaged_options_of_nothing_are_nobodys(left: str, resume: bool, tmp_path: Path) -> None:
    (tmp_path / OPTIONS).write_text(left)
    options = {"train": {"seed": 1}}
    with run_folder.begun(tmp_path, options, resume):
        assert read_json(tmp_path / OPTIONS) == options
        with pytest.raises(ValueError, match="holds a run already"):
            run_folder.begun(tmp_path, options, False).__enter__()
    assert [file.name for file in tmp_path.iterdir()] == [OPTIONS]


def test_copies_beside_the_checkpoints_are_none(stopped: Any, tmp_path: Path) -> None:
    stopped("main", 9, tmp_path)
    newest = tmp_path / "main" / "checkpoint-8"
    copies = [newest.with_name(name) for name in ("checkpoint-9-backup", "checkpoint-old-9")]
    for copy in copies:
        shutil.copytree(newest, copy)
        (copy / checkpoints.COMPLETE).unlink()
    assert checkpoints.last_checkpoint(tmp_path / "main") == newest
    assert all(copy.is_dir() for copy in copies)


@pytest.mark.parametrize("args", [tiny.ARGS, TrainingArguments(use_cpu=True, report_to="none")])
def test_resume_needs_a_folder(args: Any) -> None:
    with pytest.raises(ValueError, match=r"resume=True has no folder .*give output_dir="):
        fit(make_model(), make_rows(), None, tiny.DROP, args=args, resume=True)


def test_resume_of_a_finished_run_trains_no_more(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    steps: list[int] = []
    run(tmp_path, resume=True, callbacks=counting(steps))
    assert outcome(tmp_path) == outcome(whole) and not steps


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
ENDED: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "without checkpoints": ({"save_strategy": "no"}, []),
    "with the best one alone": (BEST | {"save_total_limit": 1}, []),
    "by early stopping": (BEST | {"save_total_limit": 1}, [EarlyStoppingCallback(1)]),
}


@pytest.mark.parametrize("how", ENDED)
def test_a_finished_run_is_not_trained_again(how: str, tmp_path: Path) -> None:
    """Whichever checkpoints it left; and a try with another model does not free its folder."""
    extra, callbacks = ENDED[how]
    args = replace(tiny.ARGS, eval_every=4, extra=extra)
    first, steps = run(tmp_path, args=args, callbacks=callbacks), list[int]()
    assert not (tmp_path / f"main/checkpoint-{first.steps - tiny.WARMUP}").exists()
    before, wrong, model = outcome(tmp_path), make_model(), make_model()
    loradrop.inject(wrong, tiny.PLAIN)
    with pytest.raises(ValueError, match="injected with another configuration"):
        run(tmp_path, args=args, resume=True, model=wrong)
    again = run(
        tmp_path, args=args, resume=True, model=model, callbacks=[*callbacks, *counting(steps)]
    )
    assert not steps and outcome(tmp_path) == before and again.to_dict() == first.to_dict()
    loradrop.save(model, tmp_path / "again")
    files = [tmp_path / name / "adapter.safetensors" for name in ("adapter", "again")]
    assert tiny.equal(*map(load_file, files))


@pytest.mark.parametrize("name", ["adapter/adapter.safetensors", "result.json"])
def test_a_result_that_is_damaged_is_made_again(
    name: str, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    run(tmp_path, resume=True)
    assert f"{tmp_path / name} is damaged" in caplog.text
    assert "Going on from the run's last checkpoint" in caplog.text
    assert outcome(tmp_path) == outcome(whole)


def test_rows_to_measure_on_can_come_later(tmp_path: Path) -> None:
    assert run(tmp_path, dev=None).metrics == {}
    steps: list[int] = []
    assert run(tmp_path, resume=True, callbacks=counting(steps)).metrics["loss"] and not steps


# The event at which a run is stopped, after which step, and whether by a signal. transformers
# saves at its next event: before a step's weights change, after, before a step, after an epoch.
STOPS = [
    ("on_step_begin", 5, True),
    ("on_optimizer_step", 5, True),
    ("on_step_end", 5, True),
    ("on_step_end", 6, True),
    ("on_step_end", 6, False),
]


@pytest.mark.parametrize("stage", ["warmup", "main"])
@pytest.mark.parametrize(("event", "step", "by_signal"), STOPS)
def test_stopped_gently_and_resumed(
    stage: str, event: str, step: int, by_signal: bool, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It ends after step 6, decides nothing in its warm-up, and no step is made again."""
    tiny.take_signals_at_once(monkeypatch)
    args = replace(tiny.ARGS, save_every=50, extra={"enable_jit_checkpoint": by_signal})
    stopping, steps = tiny.Stops(stage, event, step, by_signal), list[int]()
    if stage == "warmup":
        says = r"stopped at step 6 of the 8 of its warm-up, and has decided nothing: .*resume=True"
        with pytest.raises(RuntimeError, match=says):
            run(tmp_path, args=args, callbacks=[stopping])
    else:
        assert run(tmp_path, args=args, callbacks=[stopping]).steps == tiny.WARMUP + 6
    run(tmp_path, args=args, resume=True, callbacks=counting(steps))
    before, expected = (stage == "main") * tiny.WARMUP, outcome(whole)
    if event == "on_optimizer_step":  # transformers saves before it logs
        history = expected["result"]["history"]
        history[:] = [entry for entry in history if entry["step"] != before + 6]
    assert outcome(tmp_path) == expected
    assert len(steps) == tiny.TOTAL - before - 6


def test_a_warm_up_that_is_stopped_without_a_folder() -> None:
    stopping = [tiny.Stops("warmup", "on_step_end", 3, by_signal=False)]
    with pytest.raises(RuntimeError, match=r"step 3 of the 8.*without output_dir nothing of it is"):
        fit(make_model(), make_rows(), None, tiny.DROP, args=tiny.ARGS, callbacks=stopping)


def test_the_only_checkpoint_stays_until_the_next_is_whole(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, seal = replace(tiny.ARGS, extra={"save_total_limit": 1}), checkpoints.seal

    def fail(folder: Path) -> None:
        if folder.parent.name == "main" and folder.name == "checkpoint-12":
            stop()
        seal(folder)

    with monkeypatch.context() as patch, pytest.raises(tiny.StopError):
        patch.setattr(checkpoints, "seal", fail)
        run(tmp_path, args=args)
    steps: list[int] = []
    run(tmp_path, args=args, resume=True, callbacks=counting(steps))
    assert steps == list(range(9, tiny.TOTAL - tiny.WARMUP + 1))
    assert outcome(tmp_path) == outcome(whole)
    assert [folder.name for folder in (tmp_path / "main").iterdir()] == ["checkpoint-14"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_full_disk_is_named(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of torch.save it is an "unexpected pos"."""
    write = torch.save

    def full(what: Any, path: Any, *more: Any) -> None:
        write(what, "/dev/full" if "main/checkpoint-8/optimizer" in str(path) else path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint-8 cannot be written.*Is the disk full"):
            run(tmp_path)
    steps: list[int] = []
    run(tmp_path, resume=True, callbacks=counting(steps))
    assert steps == list(range(5, tiny.TOTAL - tiny.WARMUP + 1))
    assert outcome(tmp_path) == outcome(whole)


def test_a_model_that_decided_what_was_not_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the disk is full between warm-up and main run."""
    model = make_model()
    with monkeypatch.context() as patch, pytest.raises(tiny.StopError):
        patch.setattr(run_folder, "save", lambda *_: stop())
        run(tmp_path, model=model)
    with pytest.raises(ValueError, match=r"a new model, or call loradrop\.remove\(model\) first"):
        run(tmp_path, model=model, resume=True)
    loradrop.remove(model)
    run(tmp_path, model=model, resume=True)
    assert outcome(tmp_path) == outcome(whole)


def test_resume_without_anything_to_resume_starts(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, resume=True)
    assert outcome(tmp_path) == outcome(whole)


def test_resume_with_the_model_in_memory(whole: Path, tmp_path: Path) -> None:
    model = make_model()
    interrupted(tmp_path, "main", 9, model=model)
    assert model.lora_bank.collector is None
    run(tmp_path, resume=True, model=model)
    assert outcome(tmp_path) == outcome(whole)


OTHER: dict[str, dict[str, Any]] = {
    r"train: learning_rate": {"args": replace(tiny.ARGS, learning_rate=0.5)},
    r"train: seed, steps": {"args": replace(tiny.ARGS, steps=30, seed=3)},
    r"lora: r\)": {"config": replace(tiny.DROP, r=2)},
    r"lora: method": {"config": tiny.PLAIN},
    r"model: fingerprint": {"model": make_model(labels=4)},
    r"rows: count": {"train": make_rows(88)},
    r"rows: max_length": {"train": TokenizedDataset(make_rows(), max_length=8)},
    r"parameters: dtype": {"model": make_model().to(torch.bfloat16)},
}


@pytest.mark.parametrize("named", OTHER)
def test_resume_with_other_options_is_refused(named: str, stopped: Any, tmp_path: Path) -> None:
    stopped("warmup", 5, tmp_path)
    refusal = rf"was begun with other options \({named}.*choose another"
    with pytest.raises(ValueError, match=refusal):
        run(tmp_path, resume=True, **OTHER[named])


def test_the_order_of_target_modules_may_differ(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    options = read_json(tmp_path / "run" / OPTIONS)
    options["lora"]["target_modules"].reverse()
    assert len(options["lora"]["target_modules"]) > 1
    write_json(tmp_path / "run" / OPTIONS, options)
    run(tmp_path / "run", resume=True)


def test_options_that_an_older_version_wrote(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    options = read_json(tmp_path / "run" / OPTIONS)
    del options["rows"], options["parameters"]
    write_json(tmp_path / "run" / OPTIONS, options)
    run(tmp_path / "run", resume=True)
    assert read_json(tmp_path / "run" / OPTIONS)["rows"]["count"] == tiny.ROWS


def test_used_output_is_refused(whole: Path) -> None:
    before = outcome(whole)
    with pytest.raises(ValueError, match="holds a run already: resume, or choose another output"):
        run(whole)
    assert outcome(whole) == before


def test_an_error_before_training_leaves_the_output_free(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        run(tmp_path, replace(tiny.DROP, target_modules=["qwery"]))
    run(tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def test_warm_up_alone_and_then_the_rest(whole: Path, tmp_path: Path) -> None:
    options = {"args": tiny.ARGS, "output_dir": tmp_path, "data": {"train": "a fingerprint"}}
    plan = training.warm_up(make_model(), make_rows(), tiny.DROP, **options)
    assert plan.warmup["steps"] == tiny.WARMUP and not (tmp_path / "main").exists()
    run(tmp_path, resume=True)
    assert outcome(tmp_path) == outcome(whole)
    assert json.loads(json.dumps(plan.to_dict())) == outcome(whole)["plan"]


def test_killed_once_settled(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(tiny.StopError):
        patch.setattr(stages, "save", lambda *_: stop())
        run(tmp_path, tiny.SETTLING)
    run(tmp_path, tiny.SETTLING, resume=True)
    assert outcome(tmp_path) == outcome(runs["settling"][0])


@pytest.mark.parametrize("method", ["vera", "prilora"])
@pytest.mark.parametrize("step", [3, 14, tiny.TOTAL])
def test_a_bank_of_other_tensors_is_resumed(
    method: str, step: int, runs: tiny.Runs, tmp_path: Path
) -> None:
    config, (folder, result, _) = tiny.CONFIGS[method], runs[method]
    assert result.plan.warmup is None and result.plan.kept is None
    assert result.metrics["loss"] < 1.09  # ln 3: it has learnt
    interrupted(tmp_path, "main", step, config=config)
    run(tmp_path, config, resume=True)
    assert outcome(tmp_path) == outcome(folder)
