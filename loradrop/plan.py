"""The plan: what was measured, what was decided, and everything needed to decide it again."""

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from loradrop._version import __version__
from loradrop.bank import AdapterBank, Target, bank_of
from loradrop.config import LoRAConfig

SCHEMA = 1
# from the version that is the key
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One adaptation of one base model.

    slots       which adapter each target uses, None for none; equal numbers share
    kept        the targets with an adapter of their own, None before any decision
    scores      of the deciding probe: source, tokens, rows and name -> Σ‖s·B·A·x‖²
                (`Scores.to_dict`)
    warmup      steps, planned, settled, and how often a bootstrap keeps each target (name -> part
                of the draws)
    base        id, revision and a fingerprint of all tensor names and shapes of the model
    data        fingerprints of the training and dev rows;  seeds, versions: as they were
    """

    config: LoRAConfig
    targets: tuple[Target, ...]
    slots: tuple[int | None, ...]
    kept: tuple[str, ...] | None = None
    scores: Mapping[str, Any] | None = None
    warmup: Mapping[str, Any] | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Elements of all adapters, each once."""
        sizes = {
            s: t.parameters for s, t in zip(self.slots, self.targets, strict=True) if s is not None
        }
        return sum(sizes.values())

    @property
    def full_parameters(self) -> int:
        """Elements of the adapters of LoRA on all targets."""
        return sum(target.parameters for target in self.targets)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for plan.json; `from_dict` reads it."""
        return {
            "schema": SCHEMA,
            "config": self.config.to_dict(),
            "targets": [target._asdict() for target in self.targets],
            "slots": list(self.slots),
            "kept": None if self.kept is None else list(self.kept),
            "scores": self.scores,
            "warmup": self.warmup,
            "base": dict(self.base),
            "data": dict(self.data),
            "seeds": dict(self.seeds),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan that `to_dict` wrote.

        Raises ValueError for a newer schema, or what is no plan.
        """
        version = data.get("schema") if isinstance(data, Mapping) else None
        if not isinstance(version, int):
            raise ValueError("this is no loradrop plan: it has no schema version")
        if version > SCHEMA:
            raise ValueError(
                f"the plan has schema {version}, this loradrop {__version__} reads up to "
                f"{SCHEMA}: upgrade loradrop"
            )
        fields = dict(data)
        for step in range(version, SCHEMA):
            fields = _MIGRATIONS[step](fields)
        fields.pop("schema")
        try:
            config = LoRAConfig.from_dict(fields.pop("config"))
            targets = tuple(Target(**target) for target in fields.pop("targets"))
            slots = tuple(fields.pop("slots"))
            kept = fields.pop("kept")
            return cls(
                config=config,
                targets=targets,
                slots=slots,
                kept=None if kept is None else tuple(kept),
                **fields,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the plan is damaged: {error!r} does not fit schema {SCHEMA}"
            ) from error


def plan_of(model: nn.Module) -> Plan:
    """The plan of an injected model as it stands: what `fit` or `load` recorded, with today's
    slots.
    """
    bank = bank_of(model)
    recorded = bank.plan if isinstance(bank.plan, Plan) else None
    fresh = Plan(
        config=bank.config, targets=bank.targets, slots=tuple(bank.slots), kept=_kept(bank)
    )
    if recorded is not None:
        return replace(recorded, slots=fresh.slots, kept=fresh.kept)
    scores = None if bank.scores is None else bank.scores.to_dict()
    return replace(fresh, scores=scores, base=base_of(model), versions=versions())


def _kept(bank: AdapterBank) -> tuple[str, ...] | None:
    """Targets that are alone on their slot, once anything is shared or dropped."""
    users = [sum(other == slot for other in bank.slots) for slot in bank.slots]
    if None not in bank.slots and max(users) == 1:
        return None if bank.plan is None else bank.plan.kept
    if isinstance(bank.plan, Plan) and bank.plan.slots == tuple(bank.slots):
        return bank.plan.kept
    return tuple(
        t.name
        for t, n, s in zip(bank.targets, users, bank.slots, strict=True)
        if n == 1 and s is not None
    )


def base_of(model: nn.Module) -> dict[str, Any]:
    """Which model it is: id and revision where its config knows them, and a fingerprint of its
    tensors.
    """
    config = getattr(model, "config", None)
    shapes = [
        (k, tuple(v.shape)) for k, v in model.state_dict().items() if not k.startswith("lora_bank.")
    ]
    return {
        "class": type(model).__name__,
        "id": getattr(config, "_name_or_path", None),
        "revision": getattr(config, "_commit_hash", None),
        "fingerprint": hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest(),
    }


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"loradrop": __version__}
    for name in ("torch", "transformers", "safetensors", "triton", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
