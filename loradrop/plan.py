"""The plan: what was measured, what was decided, and everything needed to decide it again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loradrop._version import __version__
from loradrop.config import LoRAConfig
from loradrop.scores import Assignment, Target

SCHEMA = 5
_MAPPINGS = ("facts", "base", "data", "seeds", "versions")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One adaptation of one base model.

    assignment  which adapter each target uses, and which targets the decision kept
    parameters  trainable elements of all adapters, each once
    scores      of the deciding probe: source, tokens, rows and name -> Σ‖s·B·A·x‖²
                (`Scores.to_dict`)
    cut         of the last `truncate`: metric, values (name -> what each direction was worth),
                slots (who shared then), ranks (name -> what is left), full (name -> the rank before
                any cut), earlier (whether there was a cut before it), loss (its predicted rise),
                compensated (that, as made up for)
    warmup      steps, planned, settled, and how often a bootstrap keeps each target (name -> part
                of the draws)
    facts       name -> number: what the method says of its bank (`Method.facts`)
    base        id, revision and a fingerprint of all tensor names and shapes of the model; of a
                classifier also labels, the names of its classes, and problem_type
    data        fingerprints of the training and dev rows;  seeds, versions: as they were
    """

    config: LoRAConfig
    assignment: Assignment
    parameters: int
    scores: Mapping[str, Any] | None = None
    cut: Mapping[str, Any] | None = None
    warmup: Mapping[str, Any] | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.assignment.targets

    @property
    def slots(self) -> tuple[int | None, ...]:
        return self.assignment.slots

    @property
    def kept(self) -> tuple[str, ...] | None:
        return self.assignment.kept

    @property
    def full_parameters(self) -> int:
        """Elements of the adapters of LoRA on all targets, at the ranks before any cut."""
        ranks = self.full_ranks
        return sum(t._replace(r=ranks[t.name]).parameters for t in self.targets)

    @property
    def lora_parameters(self) -> int:
        """Elements of LoRA on all targets at the ranks of the configuration."""
        ranks = {t.name: self.config.rank(t.name) for t in self.targets}
        return sum(
            t._replace(r=min(ranks[t.name], t.in_features, t.out_features)).parameters
            for t in self.targets
        )

    @property
    def full_ranks(self) -> dict[str, int]:
        """Name -> the rank before any cut."""
        before = {} if self.cut is None else self.cut["full"]
        return {target.name: before.get(target.name, target.r) for target in self.targets}

    def after_cut(self, record: Mapping[str, Any] | None) -> "Plan":
        """The plan with what `LoRABank.cut` says of a cut; None leaves it as it is."""
        if record is None:
            return self
        more = {"full": self.full_ranks, "earlier": self.cut is not None}
        return replace(self, cut={**record, **more})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for plan.json; `from_dict` reads it."""
        return {
            "schema": SCHEMA,
            "config": self.config.to_dict(),
            "targets": [target._asdict() for target in self.targets],
            "slots": list(self.slots),
            "kept": None if self.kept is None else list(self.kept),
            "parameters": self.parameters,
            "scores": self.scores,
            "cut": self.cut,
            "warmup": self.warmup,
            **{name: dict(getattr(self, name)) for name in _MAPPINGS},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan that `to_dict` wrote, in this version or an earlier one.

        Raises ValueError for a newer schema, and for data that is not a plan.
        """
        version = data.get("schema") if isinstance(data, Mapping) else None
        if not isinstance(version, int):
            raise ValueError("this is not a loradrop plan: it has no schema version")
        if version > SCHEMA:
            raise ValueError(
                f"the plan has schema {version}, and loradrop {__version__} reads up to {SCHEMA}: "
                "upgrade loradrop"
            )
        fields = dict(data)
        try:
            for step in range(version, SCHEMA):
                fields = _MIGRATIONS[step](fields)
            del fields["schema"]
            _require_forms(fields)
            config = LoRAConfig.from_dict(fields.pop("config"))
            targets = tuple(Target(**target) for target in fields.pop("targets"))
            slots, kept = tuple(fields.pop("slots")), fields.pop("kept")
            assignment = Assignment(targets, slots, None if kept is None else tuple(kept))
            return cls(config=config, assignment=assignment, **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the plan is damaged: {error!r} (schema {SCHEMA})") from error


_KEYS: dict[str, tuple[str, ...]] = {  # the first three may be None
    "scores": ("source", "tokens", "rows", "values"),
    "cut": ("metric", "values", "ranks", "full", "loss", "compensated"),
    "warmup": ("steps", "planned", "settled"),
    **dict.fromkeys(_MAPPINGS, ()),
}


def _require_forms(fields: Mapping[str, Any]) -> None:
    """Raises TypeError for a section that is not a mapping, or lacks something."""
    for name, keys in _KEYS.items():
        value = fields.get(name)
        if value is None and name not in _MAPPINGS:
            continue
        if name in fields and not (isinstance(value, Mapping) and {*keys} <= value.keys()):
            raise TypeError(f"{name} is {str(value)[:60]}")


def _from_1(data: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 left the parameters to be counted, of plain pairs, and called the root "norm"."""
    targets = tuple(Target(**target) for target in data["targets"])
    data["parameters"] = Assignment(targets, tuple(data["slots"])).parameters
    method = dict(data["config"].get("method", {}))
    if method.get("importance") == "norm":
        method["importance"] = "root"
        data["config"] = {**data["config"], "method": method}
    return data


def _from_4(data: dict[str, Any]) -> dict[str, Any]:
    """Up to schema 4 the method spectral did not change s, and its first cuts were not made up
    for.
    """
    if data.get("cut") is not None:
        data["cut"] = {"compensated": None, **data["cut"]}
    method = data["config"].get("method", {})
    if method.get("name") == "spectral":
        data["config"] = {**data["config"], "method": {"scale": "fixed", **method}}
    return data


# By the schema that each starts from. Schema 3 added `cut`, and schema 4 `facts`.
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _from_1, 2: dict, 3: dict, 4: _from_4,
}  # fmt: skip
