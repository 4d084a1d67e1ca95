"""Which base model an adapter belongs to: what is written down of it, and compared."""

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from loradrop.wrapped import tensors_of

_log = logging.getLogger(__name__)
_COMMIT = re.compile("[0-9a-f]{40}")


def classes_of(model: nn.Module) -> dict[str, Any]:
    """What the config of a classifier says of its classes: `labels`, their names where they have
    some, and `problem_type` where it is not one class each, which a forward sets by itself. Apart
    from `base_of`, which a run that resumes must have as before.
    """
    config = getattr(model, "config", None)
    if "Classification" not in type(model).__name__:
        return {}
    names = getattr(config, "id2label", None) or {}
    labels = [names[i] for i in range(len(names)) if i in names]
    named = len(labels) == len(names) and labels != [f"LABEL_{i}" for i in range(len(labels))]
    kind = getattr(config, "problem_type", None)
    found = {"labels": labels if named else None}
    found["problem_type"] = None if kind == "single_label_classification" else kind
    return {key: value for key, value in found.items() if value}


def tell_base(what: Any, there: Mapping[str, Any], model: nn.Module) -> None:
    """One line where an adapter that fits was trained on another base than `model`, by what its
    plan or its configuration says of that. Names and shapes of tensors, which are compared, do not
    tell models of one family apart.
    """
    here, name = base_of(model), there.get("id")
    before, now = (_commit(name, of) for of in (there.get("revision"), here["revision"]))
    if there.get("fingerprint") not in (None, here["fingerprint"]):
        differ = "whose tensors are not all those of this model; its targets fit"
        _log.warning("%s was trained on %s, %s", what, name or "a base model", differ)
    elif name and here["id"] and _is_another(str(name), str(here["id"]), what):
        _log.warning(
            "%s was trained on %s, and this model is %s: its tensors have the same shapes, but an "
            "adapter of another model is noise", what, name, here["id"],
        )  # fmt: skip
    elif name and before and now and before != now:
        _log.warning(
            "%s was trained on %s at revision %s, and this model is of revision %s: "
            "from_pretrained takes revision=", what, name, before, now,
        )  # fmt: skip


def _is_another(there: str, here: str, adapter: Any) -> bool:
    """Whether two names of a base are of two models, unless the adapter lies in the folder of the
    second: there it was saved with the first.
    """
    at = Path(str(adapter)).absolute()
    beside = at.exists() and Path(here).absolute() in (at, *at.parents)
    return Path(there).name != Path(here).name and not beside


def commit_of(model_id: str, revision: str | None) -> str | None:
    """The commit that a revision of an id of the Hub was when it was last read here, `revision`
    itself where that is not known: of a folder, or read into a cache of its own.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model_id).exists():
        return revision
    try:
        found = try_to_load_from_cache(model_id, "config.json", revision=revision)
    except (HFValidationError, OSError):
        return revision
    commit = Path(found).parent.name if isinstance(found, str) else ""
    return commit if _COMMIT.fullmatch(commit) else revision


def _commit(model_id: Any, revision: Any) -> str | None:
    """The commit of a revision that may have a name; None where it cannot be known."""
    if revision is None or not isinstance(model_id, str):
        return None
    found = commit_of(model_id, str(revision))
    return found if found is not None and _COMMIT.fullmatch(found) else None


def base_of(model: nn.Module) -> dict[str, Any]:
    """Class, id and revision of a model where its config has them, and its tensors' fingerprint, of
    names and shapes alone.
    """
    config = getattr(model, "config", None)
    own = {k: v for k, v in tensors_of(model).items() if not k.startswith("lora_bank.")}
    shapes = [(key, tuple(value.shape)) for key, value in own.items()]
    return {
        "class": type(model).__name__,
        "id": getattr(config, "_name_or_path", None),
        "revision": getattr(config, "_commit_hash", None),
        "fingerprint": hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest(),
    }
