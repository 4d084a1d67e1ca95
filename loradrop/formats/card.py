"""The model card of an adapter in PEFT's format."""

from collections import Counter
from pathlib import Path

from torch import nn

from loradrop._version import __version__
from loradrop.files import rendered
from loradrop.formats.engines import EngineVerdict
from loradrop.formats.peft_file import PeftFile, task_of
from loradrop.plan import Plan


def card_of(model: nn.Module, plan: Plan, file: PeftFile, verdicts: list[EngineVerdict]) -> str:
    """The model card: what was kept and shared, how to use it, and what each engine says."""
    base = file.config["base_model_name_or_path"]
    public = base if base and not Path(base).exists() else None  # a folder means nothing elsewhere
    states = list(zip(plan.targets, plan.assignment.states, strict=True))
    kinds: dict[str, Counter[str]] = {}
    for target, state in states:
        kinds.setdefault(target.kind, Counter())[state] += 1
    loader = task_of(model)[1]
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    extra = f", num_labels={labels}" if labels and loader.endswith("Classification") else ""
    return rendered(
        "model_card.md",
        public=public,
        title=public or type(model).__name__,
        plan=plan,
        version=__version__,
        kinds=kinds,
        total=sum(kinds.values(), Counter()),
        own=[target.name for target, state in states if state == "own"],
        loader=loader,
        arguments=f"{public or 'path/to/the/base/model'!r}{extra}",
        rank=file.config["r"],
        verdicts=verdicts,
    )
