"""A run from a YAML file: the model, the data, the arms to compare, and the files that come out.

`training` loads slowly, so it is imported when the data was found and read.
"""

import itertools
import logging
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch.utils.data import DataLoader

from loradrop.command.adapter_bases import load_base
from loradrop.command.base_models import build, config_of, to_accelerator
from loradrop.command.rows import Rows, in_order_of, rows_for, rows_of
from loradrop.command.run_config import CONFIG, RunConfig, folder_of
from loradrop.config import LoRAConfig, TrainConfig
from loradrop.files import require_writable, write_json, write_text
from loradrop.injection import plan_of
from loradrop.loading import load
from loradrop.machine import is_first_rank
from loradrop.plan import Plan
from loradrop.probing import probe
from loradrop.report.grid import Arm
from loradrop.report.page import file_size, how_to_load, write_report
from loradrop.report.plots import plot_history, plot_importance
from loradrop.report.terminal import arms_table, plan_table
from loradrop.scores import Scores
from loradrop.text.examples import TextTask
from loradrop.text.metrics import metric_fn
from loradrop.text.task import load_task
from loradrop.training.run_folder import OPTIONS, held_by_a_run

if TYPE_CHECKING:
    from loradrop.training.stages import Result

_log = logging.getLogger(__name__)
ELSEWHERE = "name another folder by output="


def run(config: RunConfig, *, resume: bool = False) -> dict[str, "Result"]:
    """Train `config.lora` and every arm, each into its own folder. Name -> result.

    The output folder gets config.yaml, plan.json, the pictures and the report. Raises ValueError
    for a folder that holds a run already, unless `resume` continues that very run; RuntimeError
    where a signal stopped an arm.
    """
    folder = Path(config.output)
    if not resume and (folder / CONFIG).exists():
        folders = (folder_of(config, name) for name in (*config.arms, config.name))
        held = next((arm for arm in folders if (arm / OPTIONS).exists()), folder)
        raise ValueError(held_by_a_run(held))
    require_writable(folder, ELSEWHERE)
    task = load_task(config.data)
    data = f"{task.name}: {len(task.train)} training and {len(task.dev)} dev examples"
    _log.info("%s, %s", data, task.kind)
    results: dict[str, Result] = {}
    for name, lora in {**config.arms, config.name: config.lora}.items():
        _log.info("%s, %d of %d", name, len(results) + 1, len(config.arms) + 1)
        results[name] = train_arm(config, task, lora, folder_of(config, name), resume)
        # Not before: the folder may belong to a run with other options.
        if len(results) == 1 and is_first_rank():
            write_text(folder / CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))
        results[name].require_complete(name)
    if not is_first_rank():
        return results
    arms = [
        Arm(name=name, **{field.name: getattr(result, field.name) for field in fields(Arm)[1:]})
        for name, result in results.items()
    ]
    main = results[config.name].plan
    write_json(folder / "plan.json", main.to_dict())
    if main.scores is not None:
        plot_importance(main, folder / "importance.png")
    plot_history(arms, folder / "loss.png")
    adapter = folder_of(config, config.name) / "adapter"
    classes = None if task.kind == "causal_lm" else max(1, len(task.labels))
    facts = {
        "model": config.model.id,
        "data": data,
        **({"classes": ", ".join(task.labels)} if task.labels else {}),
        "seed": str(config.train.seed),
        "run it again": f"loradrop train {shlex.quote(str(folder / CONFIG))} output=NEW_FOLDER",
        "load its adapter": how_to_load(main, adapter, classes),
        "adapter file": file_size(main, adapter),
        "versions": ", ".join(f"{k} {v}" for k, v in main.versions.items()),
    }
    write_report(folder / "report.html", arms, title=f"{config.name} on {task.name}", facts=facts)
    print(plan_table(main))
    print(arms_table(arms, task.metric))
    return results


def _prepare(
    config: RunConfig, task: TextTask, lora: LoRAConfig
) -> tuple[Any, LoRAConfig, Rows, TrainConfig]:
    """The model, its adapters, the rows, and how to train.

    A head that the checkpoint lacks is trained whole, unless `modules_to_save` says otherwise.
    """
    if task.labels:  # a head knows its classes
        task = in_order_of(task, config_of(config.model), config.model.id)
    model, tokenizer, missing = build(config, task)
    if lora.modules_to_save is None and missing:
        lora = replace(lora, modules_to_save=tuple(missing))
    best = config.train.extra.get("load_best_model_at_end")  # of the checkpoints, measured on dev
    every = config.train.save_every if best else 0.2  # five points, for a curve in the report
    every = config.train.eval_every or every
    rows = rows_of(task, model, tokenizer, config.data.max_length)
    return model, lora, rows, replace(config.train, eval_every=every)


def train_arm(
    config: RunConfig, task: TextTask, lora: LoRAConfig, folder: Path, resume: bool = False
) -> "Result":
    """One `fit` of `task` into `folder`."""
    from loradrop.training.fit import fit

    model, lora, rows, args = _prepare(config, task, lora)
    return fit(
        model, rows.train, rows.dev, lora, args=args, metric=metric_fn(rows.task),
        collate=rows.collate, data=rows.task.fingerprint, output_dir=folder, resume=resume,
    )  # fmt: skip


def warm_up_run(config: RunConfig, *, resume: bool = False) -> Plan:
    """The warm-up of `config.lora` alone; `run(config, resume=True)` continues from it."""
    require_writable(Path(config.output), ELSEWHERE)
    model, lora, rows, args = _prepare(config, load_task(config.data), config.lora)
    from loradrop.training.fit import warm_up

    plan = warm_up(
        model, rows.train, lora, args=args, collate=rows.collate, data=rows.task.fingerprint,
        output_dir=folder_of(config, config.name), resume=resume,
    )  # fmt: skip
    if is_first_rank():
        write_json(Path(config.output) / "plan.json", plan.to_dict())
    return plan


def measure(
    config: RunConfig,
    adapter: str | Path,
    *,
    model_id: str | None = None,
    split: str = "train",
    batches: int | None = None,
) -> tuple[Plan, Scores]:
    """The plan of an adapter, native or PEFT's, and its scores on a split of the data, offline.

    model_id  the base model, instead of the one that the adapter names; its revision and dtype are
              those of `config.model`
    batches   use only that many, the first ones; None is all

    The tokens that count are those of `config.train.mask`. Raises ValueError for data that the
    adapter's head was not made for.
    """
    named = config.model
    base, _ = load_base(
        adapter, model_id, named.dtype, revision=named.revision, option="model="
    )
    load(base, adapter)
    to_accelerator(base)
    rows = rows_for(base, config.data, adapter)
    chosen = rows.train if split == "train" else rows.dev
    loader = DataLoader(chosen, batch_size=config.train.batch_size, collate_fn=rows.collate)
    scores = probe(base, itertools.islice(loader, batches), mask=config.train.mask)
    return replace(plan_of(base), scores=scores.to_dict()), scores
