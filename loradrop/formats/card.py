"""The model card of an adapter in PEFT's format: our part between two marks, yours around it."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from loradrop._version import __version__
from loradrop.files import rendered
from loradrop.formats.engines import EngineVerdict, vllm_rank
from loradrop.formats.peft_file import PeftFile, task_of
from loradrop.origin import classes_of
from loradrop.plan import Plan
from loradrop.scores import spread
from loradrop.wrapped import embedding_names

START = "<!-- loradrop: every export renews what is between these marks; write before or after -->"
END = "<!-- /loradrop -->"
FOLDER = "path/to/this/folder"
_OF_BASE = "base_model:adapter:"
_WORTH = {  # by the metric of a cut
    "loss": "by the predicted rise of the loss without them",
    "output": "by their part of the squared norm of the layer's LoRA output",
    "weight": "by their part of the squared norm of s·B·A, without data",
}


def card_of(model: nn.Module, plan: Plan, file: PeftFile, verdicts: list[EngineVerdict]) -> str:
    """The model card: what was kept and shared, how each engine that takes the file loads it."""
    base = file.config["base_model_name_or_path"]
    public = base if base and not Path(base).exists() else None  # a folder means nothing elsewhere
    states = list(zip(plan.targets, plan.assignment.states, strict=True))
    kinds: dict[str, Counter[str]] = {}
    for target, state in states:
        kinds.setdefault(target.kind, Counter())[state] += 1
    loader = task_of(model)[1]
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    names = classes_of(model).get("labels") or plan.base.get("labels")
    extra = of_head(labels, names) if labels and loader.endswith("Classification") else ""
    revision = file.config.get("revision") if public else None
    of_revision = "" if revision is None else f", revision={revision!r}"
    taken = [verdict.engine for verdict in verdicts if verdict.ok]
    writes_text = loader == "AutoModelForCausalLM"
    return rendered(
        "model_card.md",
        public=public,
        title=public or type(model).__name__,
        plan=plan,
        version=__version__,
        kinds=kinds,
        total=sum(kinds.values(), Counter()),
        cut=_of_cut(plan),
        own=[target.name for target, state in states if state == "own"],
        loader=loader,
        arguments=f"{public or 'path/to/the/base/model'!r}{of_revision}{extra}",
        tokens=_tokens_in(model, file),
        model=public or "path/to/the/base/model",
        at="" if revision is None else f" --revision {revision}",
        folder=FOLDER,
        in_transformers="peft" in taken and loader.startswith("Auto") and not file.others,
        servers=[engine for engine in taken if engine != "peft" and writes_text],
        rank=file.config["r"],
        patterns="rank_pattern" in file.config,
        padded="rank_pattern" not in file.config
        and any(target.r < file.config["r"] for target in plan.targets),
        vllm_rank=vllm_rank(file),
        verdicts=verdicts,
        start=START,
        end=END,
    )


def _tokens_in(model: nn.Module, file: PeftFile) -> int | None:
    """How many tokens the embedding in the file has; None where there is none, or where what is
    known of the base model here says that it has as many.
    """
    names = embedding_names(model)
    saved = next((file.others[name] for name in names if name in file.others), None)
    if saved is None:
        return None
    from transformers import AutoConfig  # loads slowly

    try:
        name = file.config["base_model_name_or_path"]
        base = AutoConfig.from_pretrained(name, local_files_only=True)
    except Exception:  # not here: the line that the card then has is right for any base
        return len(saved)
    return None if base.get_text_config().vocab_size == len(saved) else len(saved)


def _of_cut(plan: Plan) -> dict[str, Any] | None:
    """What the card says of a cut, by module type; None where there was none."""
    if plan.cut is None:
        return None
    full, ranks = plan.full_ranks, dict[str, tuple[list[int], list[int]]]()
    for target in plan.targets:
        before, now = ranks.setdefault(target.kind, ([], []))
        before.append(full[target.name])
        now.append(plan.cut["ranks"][target.name])
    rises = {"Predicted rise of the loss": "loss", "As made up for by what is left": "compensated"}
    return {
        "worth": _WORTH[plan.cut["metric"]],
        "rises": {t: plan.cut[key] for t, key in rises.items() if plan.cut[key] is not None},
        "ranks": {kind: (spread(before), spread(now)) for kind, (before, now) in ranks.items()},
    }


def of_head(num_labels: int, labels: Sequence[str] | None) -> str:
    """The arguments of `from_pretrained` for a head: how many classes, and their names if any."""
    named = labels is not None and len(labels) == num_labels
    return f", num_labels={num_labels}" + f", id2label={dict(enumerate(labels or ()))}" * named


def extended(existing: str, ours: str) -> str:
    """The card that is there, `existing`, with our part and what our metadata adds.

    Text outside the marks stays, and so do metadata, but for the base model where ours names one.
    Raises ValueError for metadata that are not YAML.
    """
    part = _part(ours)
    assert part is not None
    return _with_metadata(with_part(existing, part), ours)


def with_part(existing: str, part: str) -> str:
    """The card that is there, `existing`, with `part`, marks included, in the place of an older."""
    old = _part(existing)
    text = f"{existing.rstrip()}\n\n{part}\n" if old is None else existing.replace(old, part)
    return text.lstrip()


def _part(card: str) -> str | None:
    start, end = card.find(START), card.find(END)
    return card[start : end + len(END)] if 0 <= start < end else None


def _with_metadata(text: str, ours: str) -> str:
    from huggingface_hub.repocard import metadata_load, metadata_save

    with tempfile.TemporaryDirectory() as folder:
        file, other = Path(folder, "README.md"), Path(folder, "ours.md")
        file.write_text(text, encoding="utf-8")
        other.write_text(ours, encoding="utf-8")
        try:
            theirs = metadata_load(file) or {}
        except Exception as error:  # of YAML, or of what it holds
            raise ValueError(
                f"the metadata at the head of the README.md that is there are not YAML ({error}): "
                "correct them, or move the file away"
            ) from error
        merged = _merged(theirs, metadata_load(other) or {})
        if merged == theirs:
            return text
        metadata_save(file, merged)
        return file.read_text(encoding="utf-8")


def _merged(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    tags = theirs.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    if "base_model" in ours:
        tags = [tag for tag in tags if not str(tag).startswith(_OF_BASE)]
        theirs = theirs | {"base_model": ours["base_model"]}
    tags += [tag for tag in ours["tags"] if tag not in tags]
    return ours | theirs | {"tags": tags}
