"""The plan that lies at a path, whatever was written there."""

from collections.abc import Mapping
from pathlib import Path

from loradrop.files import read_json
from loradrop.formats.peft_load import is_peft, plan_in
from loradrop.native import PLAN, adapters_below, is_native, read
from loradrop.plan import Plan

REPORT = "compression.json"  # of `loradrop compress`, beside the adapter


def plan_at(path: Path) -> Plan:
    """The plan in a plan.json, a native adapter, a checkpoint, the folder of a run, or what
    `loradrop compress` wrote.

    Raises FileNotFoundError where none of them is there.
    """
    if is_native(path):  # as `load` does
        return read(path).plan
    if is_peft(path) and (plan := plan_in(path)) is not None:
        return plan
    if path.is_dir() and not (path / PLAN).exists() and (path / REPORT).exists():
        path = path / REPORT
    file = path / PLAN if path.is_dir() else path
    if not file.exists():
        why = ", as PEFT's format has no plan" * is_peft(path)
        raise FileNotFoundError(
            f"{file} is not there{why}: give a plan.json, the folder of a run, or the native "
            f"adapter that loradrop.save wrote{adapters_below(path)}"
        )
    return _of_json(file) if file.suffix == ".json" else read(file).plan


def _of_json(file: Path) -> Plan:
    """The plan that the file is, or has beside other things."""
    data = read_json(file)
    beside = isinstance(data, Mapping) and "schema" not in data and "plan" in data
    return Plan.from_dict(data["plan"] if beside else data)
