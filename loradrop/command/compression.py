"""Compressing a trained adapter: measure its directions, keep those that matter, heal, write."""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from loradrop.command.adapter_bases import load_base, own_tokenizer
from loradrop.command.base_models import to_accelerator
from loradrop.command.rows import Rows, rows_for
from loradrop.command.run_config import RunConfig
from loradrop.config import DTYPES, TrainConfig
from loradrop.files import clear_drafts, draft_of, require_writable, write_json
from loradrop.formats.dtypes import FileDtypes, dtypes_in, no_wider
from loradrop.formats.hub import CARD
from loradrop.formats.peft import export, require_exportable
from loradrop.formats.peft_file import CONFIG, TENSORS, elements_of
from loradrop.injection import injection_of, plan_of
from loradrop.loading import load
from loradrop.machine import is_first_rank
from loradrop.plan import Plan
from loradrop.plan_file import REPORT
from loradrop.probing import probe
from loradrop.report.grid import Arm
from loradrop.report.page import write_report
from loradrop.report.plots import plot_spectra
from loradrop.spectral.allocation import require_trained
from loradrop.spectral.spectra import Spectrum, spectrum, spectrum_of
from loradrop.statistics.batches import MEASURED, small_batches
from loradrop.statistics.gram_sums import grams_of
from loradrop.text.metrics import metric_fn
from loradrop.training.trainer import dev_metrics, taken_as_adapted
from loradrop.truncation import require_pairs, truncate

if TYPE_CHECKING:
    from loradrop.training.stages import Result

SPECTRUM, PAGE = "spectrum.png", "report.html"
HEALING = "healing"  # in the output folder, until all else is written
WRITTEN = (TENSORS, CONFIG, CARD, REPORT, SPECTRUM, PAGE)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """An adapter on its base model, what its directions are worth, the data, if any, and the
    dtypes of its file.
    """

    source: str
    model: Any
    spectrum: Spectrum
    rows: Rows | None
    dtypes: FileDtypes


def open_adapter(
    adapter: str | Path,
    config: RunConfig | None = None,
    *,
    model_id: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    measured: int | None = None,
) -> Opened:
    """The adapter in a native or PEFT folder on its base model, measured.

    config     its `data` is measured; without, the weights decide
    model_id, revision
               the base model, instead of the one that the adapter names
    dtype      of the base model
    measured   training rows to measure; None is 1,024

    Raises ValueError for an adapter that is not plain LoRA, that was never trained, or that PEFT's
    format cannot hold, and for a base or data that it does not fit.
    """
    base, _ = load_base(adapter, model_id, dtype, revision=revision, option="model=")
    bank = load(base, adapter)
    require_pairs(base)
    require_exportable(base, "cut it in Python (loradrop.truncate, then loradrop.save)")
    dtypes = dtypes_in(adapter, base)
    if config is None:
        _log.warning("no data is given: the cut is by weights alone, and no loss is predicted")
        found, rows = spectrum_of(bank.targets, grams_of(bank), "weight"), None
    else:
        found, rows = _measured(base, config, adapter, measured)
    require_trained(found, str(adapter))
    return Opened(str(adapter), base, found, rows, dtypes)


def _measured(
    base: Any, config: RunConfig, adapter: str | Path, measured: int | None
) -> tuple[Spectrum, Rows]:
    """What the directions are worth on the data of `config`, and the data."""
    to_accelerator(base)
    rows = rows_for(base, config.data, adapter)
    some = small_batches(rows.train, rows.collate, config.train.seed, measured or MEASURED)
    return spectrum(probe(base, some, gram=True, mask=config.train.mask)), rows


def compress(
    opened: Opened,
    ranks: dict[str, int],
    out: str | Path,
    *,
    heal: int = 0,
    train: TrainConfig | None = None,
    padded: bool = False,
    dtype: str | None = None,
    resume: bool = False,
) -> tuple[Plan, dict[str, dict[str, float]]]:
    """Cut to these ranks, train what is left for `heal` steps, and write a PEFT folder.

    padded    one rank for all targets, as SGLang and llama.cpp want it
    dtype     of A and B in the file; None is that of the adapter's file, the widest where there are
              several. What is trained whole gets no wider than it was there
    resume    go on where an interrupted call with the same arguments ended, healing or writing

    Beside the adapter it writes the plan, the dev metrics, a picture of the spectra, a page that
    shows all of it, and the tokenizer that lies beside the adapter that was cut. Returns the plan,
    and the dev metrics "before" and "after" where there is data. Raises ValueError for healing
    without data.
    """
    model, rows, folder = opened.model, opened.rows, Path(out)
    if heal and rows is None:
        raise ValueError(f"heal={heal} needs data to train on: give data=")
    metrics, full = {}, plan_of(model).parameters
    healed: Result | None = None
    if rows is not None:
        metrics["before"] = _evaluated(model, rows)
    truncate(model, ranks, metric=opened.spectrum.metric)
    if rows is not None:
        if heal:
            train = replace(train or TrainConfig(), steps=heal)
            healed = _heal(model, rows, train, ranks, folder / HEALING, resume)
            healed.require_complete("the healing")
        metrics["after"] = _evaluated(model, rows)
        if not heal:
            _compare(plan_of(model), metrics)
    dtype = dtype or opened.dtypes.adapters
    with no_wider(model, opened.dtypes.whole):
        export(model, folder, padded=padded, dtype=dtype)
    plan = plan_of(model)
    size = elements_of(plan.targets, (plan.cut or {})["ranks"], padded)
    file = {"elements": size, "bytes": DTYPES[dtype].itemsize * size, "dtype": dtype}
    made = {"metrics": metrics, "heal": heal, "file": file, "plan": plan.to_dict()}
    write_json(folder / REPORT, made)
    plot_spectra(plan, folder / SPECTRUM)
    facts = _facts(plan) | {
        "A and B in the file": f"{size:,} elements, {file['bytes']:,} bytes ({dtype})"
    }
    title = f"{opened.source}, cut from {full:,} to {plan.parameters:,} parameters"
    write_report(folder / PAGE, _arms(plan, full, metrics, healed), title=title, facts=facts)
    if is_first_rank():
        if (tokenizer := own_tokenizer(opened.source)) is not None:
            tokenizer.save_pretrained(folder)
        clear_drafts(folder, WRITTEN)
        shutil.rmtree(folder / HEALING, ignore_errors=True)
    return plan, metrics


def require_apart(out: str | Path, adapter: str | Path, resume: bool = False) -> None:
    """Raises ValueError for an output that lies in the adapter's folder, or holds something: where
    the call is to `resume`, something else than an interrupted call with a healing leaves. OSError
    for one that cannot be written.
    """
    folder, source = (Path(p).expanduser().resolve() for p in (out, adapter))
    if source in (folder, *folder.parents):
        raise ValueError(f"{out} is in {adapter}, which is only read: choose another output")
    require_writable(folder, "choose another output")
    held = {file.name for file in folder.iterdir()} if folder.exists() else set()
    if HEALING in held and not resume:
        held_up = f"{out} holds a healing that was interrupted"
        raise ValueError(f"{held_up}: go on with --resume, or choose another output")
    if HEALING in held:
        held -= {HEALING, *WRITTEN}
        held = {name for name in held if draft_of(folder / name) not in WRITTEN}
        if held:
            others = ", ".join(sorted(held))
            raise ValueError(f"{out} holds {others} beside the healing: move that elsewhere")
    if held:
        raise ValueError(f"{out} is not empty: choose another output")


def _compare(plan: Plan, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Warns where dev loses far more than was predicted from the rows that were measured."""
    rise = metrics["after"]["loss"] - metrics["before"]["loss"]
    predicted = (plan.cut or {}).get("loss") or 0.0
    if rise > max(4 * predicted, 0.02 * metrics["before"]["loss"]):
        _log.warning(
            "the loss on dev rose by %.2g, and %.2g was predicted: measure more rows (--measured), "
            "keep more (--budget), or train what is left (--heal)", rise, predicted,
        )  # fmt: skip


def _evaluated(model: Any, rows: Rows) -> dict[str, float]:
    """The dev metrics."""
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            scratch, per_device_eval_batch_size=32, report_to=[], disable_tqdm=True,
            log_level_replica="passive", use_cpu=not torch.accelerator.is_available(),
        )  # fmt: skip
        with taken_as_adapted(model):
            trainer = Trainer(
                model, args, eval_dataset=rows.dev, data_collator=rows.collate,
                compute_metrics=metric_fn(rows.task),
            )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return dev_metrics(trainer)


def _arms(
    plan: Plan, full: int, metrics: dict[str, dict[str, float]], healed: "Result | None"
) -> list[Arm]:
    """The adapter as it was, and as it is now."""
    none: dict[str, Any] = {"seconds": 0.0, "steps": 0, "history": ()}
    trained = none
    if healed is not None:
        trained = {name: getattr(healed, name) for name in none}
    name = "cut" if healed is None else "cut and healed"
    before, after = metrics.get("before", {}), metrics.get("after", {})
    return [
        Arm(name="as it was", parameters=full, metrics=before, plan=None, **none),
        Arm(name=name, parameters=plan.parameters, metrics=after, plan=plan, **trained),
    ]


def _facts(plan: Plan) -> dict[str, str]:
    """What the page says beside its pictures."""
    cut = plan.cut or {}
    facts = {"model": str(plan.base.get("id") or plan.base.get("class") or "")}
    facts["a direction is worth"] = {
        "loss": "the predicted rise of the loss without it",
        "weight": "its part of the squared norm of s·B·A: no data was given",
    }[cut["metric"]]
    for key, name in (("loss", "predicted rise of the loss"), ("compensated", "as made up for")):
        if cut.get(key) is not None:
            facts[name] = f"{cut[key]:.2g}"
    return facts | {"versions": ", ".join(f"{k} {v}" for k, v in plan.versions.items())}


def _heal(
    model: Any,
    rows: Rows,
    train: TrainConfig,
    ranks: Mapping[str, int],
    folder: Path,
    resume: bool,
) -> "Result":
    from loradrop.training.fit import fit  # it loads slowly

    config, data = injection_of(model).config, dict(rows.task.fingerprint)
    data["ranks"] = json.dumps(ranks)  # a resume with other ones is refused
    return fit(
        model, rows.train, None, config, args=train, collate=rows.collate, data=data,
        output_dir=folder, resume=resume,
    )  # fmt: skip
