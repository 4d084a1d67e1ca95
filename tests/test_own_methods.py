"""Methods that somebody else writes: what goes wrong there is said, where it can be mended."""

import gc
import importlib.metadata
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from training_runs import ARGS, LORA, make_model
from transformers import Trainer, TrainingArguments

import loradrop
from loradrop import LoRAConfig, methods
from loradrop.bank import AdapterBank
from loradrop.methods import LoRADrop, Method
from loradrop.methods.base import Warmup
from loradrop.pairs import LoRABank, LoRAPair, fresh
from loradrop.scores import Assignment

ROWS = [
    {"input_ids": torch.randint(1, 64, (7,), generator=torch.Generator().manual_seed(i)),
     "labels": i % 3} for i in range(40)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Classes of one test are gone before the next one."""
    yield
    gc.collect()


def config(method: Method) -> LoRAConfig:
    return LoRAConfig(**LORA, method=method)


def fitted(method: Method, steps: int = 10, **more: Any) -> Any:
    model = make_model()
    args = replace(ARGS, steps=steps, save_every=99)
    return model, loradrop.fit(model, ROWS, None, config(method), args=args, **more)


def trainer(method: Method, folder: Path, optimizer: Any = None, **options: Any) -> Trainer:
    model = make_model()
    loradrop.inject(model, config(method))
    args = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        per_device_train_batch_size=8, **{"max_steps": 8, "save_strategy": "no"} | options,
    )  # fmt: skip
    found = None if optimizer is None else optimizer(model)
    callbacks = [loradrop.LoraDropCallback()]
    return Trainer(model, args, train_dataset=ROWS, optimizers=(found, None), callbacks=callbacks)


# ---- Its stages --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"Warmup\.steps=0: choose a whole number from 1 up"),
        ({"steps": -1}, r"Warmup\.steps=-1"),
        ({"steps": 2.5}, r"steps=2\.5: give a whole number"),
        ({"steps": 2, "source": "offlne"}, r"Warmup\.source='offlne': choose one of online"),
        ({"steps": 2, "measured": 2.0}, r"Warmup\.measured=2\.0: choose a number in \(0, 1\]"),
        ({"steps": 2, "sample_ratio": 0.0}, r"Warmup\.sample_ratio=0\.0"),
        ({"steps": 2, "settle_every": -1}, r"Warmup\.settle_every=-1"),
    ],
    ids=str,
)
def test_a_warm_up_that_has_no_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Warmup(**options)


def test_a_warm_up_as_long_as_the_run(tmp_path: Path) -> None:
    """It would train beyond the steps that were asked for, or nothing afterwards."""

    @dataclass(frozen=True, kw_only=True)
    class Long(LoRADrop):
        name: ClassVar[str] = "long"

        def warmup(self, total: int) -> Warmup:
            return Warmup(steps=8)

    for steps in (6, 8):
        with pytest.raises(ValueError, match=f"takes 8 steps, and the run has {steps}"):
            fitted(Long(keep=1), steps)
        with pytest.raises(ValueError, match=f"takes 8 steps, and the run has {steps}"):
            trainer(Long(keep=1), tmp_path, max_steps=steps).train()
    assert fitted(Long(keep=1), 9)[1].steps == 9


class WithCore(AdapterBank):
    """Pairs, and from the decision on a matrix between A and B."""

    def __init__(self, targets: Any, scaling: Any, likes: Any) -> None:
        super().__init__(targets, scaling)
        made = (fresh(target, like) for target, like in zip(targets, likes, strict=True))
        self.pairs, self.core = nn.ModuleList(LoRAPair(*pair) for pair in made), nn.ParameterList()

    def factors(self, i: int) -> Any:
        A, B = self.pairs[i].factors()
        return (self.core[i] @ A, B) if len(self.core) else (A, B)


def with_core(learns: bool = False) -> Method:
    @dataclass(frozen=True, kw_only=True)
    class Core(Method):
        name: ClassVar[str] = "grows_core"
        statistics: ClassVar[tuple[str, ...]] = ("sqnorm",)
        keeps_parameters: ClassVar[bool] = False

        def bank(self, *given: Any) -> AdapterBank:
            return WithCore(*given)

        def warmup(self, total: int) -> Warmup:
            return Warmup(steps=4)

        def update(self, bank: Any, scores: Any) -> None:
            bank.core = nn.ParameterList(nn.Parameter(torch.eye(t.r)) for t in bank.targets)

    return Core()


def test_parameters_of_a_new_kind_are_trained(tmp_path: Path) -> None:
    method = with_core()
    run = trainer(method, tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    found = run.model.lora_bank
    for core in (*found.core, *fitted(method)[0].lora_bank.core):
        assert not torch.equal(core, torch.eye(len(core)))
    again = trainer(method, tmp_path, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for one, other in zip(again.model.lora_bank.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_parameters_that_a_step_replaces_are_an_error(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Replaces(Method):
        name: ClassVar[str] = "replaces"

        def on_step_end(self, bank: Any, step: int, statistics: Any) -> None:
            if step == 3:
                pairs = [(p.A.detach()[:2], p.B.detach()[:, :2]) for p in bank.pairs]
                targets = tuple(target._replace(r=2) for target in bank.targets)
                bank.assign(Assignment(targets, bank.slots), pairs)

    message = "'replaces' replaced parameters of the bank at step 3.*in `update`"
    with pytest.raises(RuntimeError, match=message):
        fitted(Replaces())
    with pytest.raises(RuntimeError, match=message):
        trainer(Replaces(), tmp_path).train()


def test_a_decision_by_other_statistics_than_the_norm() -> None:
    @dataclass(frozen=True, kw_only=True)
    class ByMoment(Method):
        name: ClassVar[str] = "by_moment"
        statistics: ClassVar[tuple[str, ...]] = ("moment",)

        def warmup(self, total: int) -> Warmup:
            return Warmup(steps=4)

        def update(self, bank: LoRABank, scores: Any) -> Any:
            how = {"share": "group", "init": "fresh", "after_select": "reinit", "interval": 2}
            return bank.share([bank.targets[0].name], scores, **how)

    model, _ = fitted(ByMoment())
    assert model.lora_bank.assignment.kept == (model.lora_bank.targets[0].name,)


class Both(torch.optim.Optimizer):
    """Two optimisers in one, as for Muon and what it does not take; its state is computed."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts, self.defaults = parts, {}

    @property
    def param_groups(self) -> Any:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> Any:
        return {p: known for part in self.parts for p, known in part.state.items()}

    def state_dict(self) -> Any:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Any) -> None:
        for part, known in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(known)

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


def momenta(optimizer: Any, bank: nn.Module) -> list[bool]:
    state = getattr(optimizer, "optimizer", optimizer).state
    return ["momentum_buffer" in state.get(p, {}) for p in bank.parameters()]


@pytest.mark.parametrize("method", ["lora_drop", "spectral"])
def test_an_optimiser_whose_state_is_computed_forgets(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def two(model: Any) -> Any:
        whole = [p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
        bank = torch.optim.SGD(model.lora_bank.parameters(), 1e-2, momentum=0.9)
        return Both(bank, torch.optim.AdamW(whole))

    seen: list[list[bool]] = []

    class Look(loradrop.LoraDropCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **o: Any) -> None:
            super().on_step_end(args, state, control, **o)
            if state.global_step in (3, 4):
                seen.append(momenta(o["optimizer"], o["model"].lora_bank))

    of = {"lora_drop": LoRADrop(keep=1, probe_steps=4), "spectral": methods.Spectral(cut_at=4)}
    run = trainer(of[method], tmp_path, two)
    run.callback_handler.callbacks = [
        Look() if isinstance(c, loradrop.LoraDropCallback) else c
        for c in run.callback_handler.callbacks
    ]
    with caplog.at_level(logging.WARNING):
        run.train()
    before, after = seen
    assert all(before) and not any(after)
    told = "the state of Both is computed, so that of cut adapters begins anew" in caplog.text
    assert told == (method == "spectral")


def test_epochs_go_on_after_a_warm_up() -> None:
    _, result = fitted(LoRADrop(keep=1, probe_steps=4))
    steps = {entry["step"]: entry["epoch"] for entry in result.history if "loss" in entry}
    assert len(steps) == 5  # of 5 steps an epoch
    assert all(epoch == pytest.approx(step / 5) for step, epoch in steps.items())


# ---- Its name and its options ------------------------------------------------------------------


def test_a_method_without_a_name_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Nameless(Method):
        pass

    with pytest.raises(ValueError, match=r"Nameless has no name.*ClassVar\[str\] = \"nameless\""):
        loradrop.inject(make_model(), config(Nameless()))


def test_one_name_is_of_one_class() -> None:
    def made(qualname: str) -> type[Method]:
        space = {"name": "twice", "__module__": __name__, "__qualname__": qualname}
        return dataclass(frozen=True, kw_only=True)(type("Twice", (Method,), space))

    first, again = made("Twice"), made("Twice")  # as a cell of a notebook that runs twice
    loradrop.inject(make_model(), config(again()))
    other = made("Other")
    with pytest.raises(ValueError, match="name is 'twice', which"):
        loradrop.inject(make_model(), config(other()))
    assert first is not again


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    found: list[Any] = []
    real = importlib.metadata.entry_points
    monkeypatch.setattr(
        *(importlib.metadata, "entry_points"),
        lambda **of: found if of == {"group": "loradrop.methods"} else real(**of),
    )
    methods.available.cache_clear()
    yield found
    methods.available.cache_clear()


def broken() -> Any:
    raise ImportError("No module named 'not_installed'")


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (broken, "cannot be loaded (ImportError: No module named 'not_installed')"),
        (lambda: dict, "is not a subclass of loradrop.Method with a name"),
        (lambda: type("Lora", (Method,), {"name": "lora"}), "the name 'lora' is loradrop.methods"),
    ],
    ids=["broken", "no method", "a name of ours"],
)
def test_an_entry_point_that_cannot_be_taken(
    entries: list[Any], load: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The other methods are there as ever."""
    dist = SimpleNamespace(name="their-package")
    entries.append(SimpleNamespace(name="theirs", load=load, dist=dist))
    with caplog.at_level(logging.WARNING):
        assert methods.get("lora") is methods.LoRA
    assert "the method 'theirs' of the package their-package is left out" in caplog.text
    assert why in caplog.text
    assert LoRAConfig.from_dict(LoRAConfig().to_dict()) == LoRAConfig()


def test_texts_in_tuples_come_back_as_they_were(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Names(Method):
        name: ClassVar[str] = "names"
        composed_by: ClassVar[tuple[str, ...]] = ("of",)
        of: tuple[str, ...] = ("q", "v")

    method = Names()
    assert LoRAConfig.from_dict(config(method).to_dict()).method == method
    model = make_model()
    loradrop.inject(model, config(method))
    loradrop.save(model, tmp_path)
    found = make_model()
    loradrop.inject(found, config(method))
    loradrop.load(found, tmp_path)
    with pytest.raises(ValueError, match="of='q': give a list of texts"):
        Names(of="q")  # type: ignore[arg-type]


def test_an_option_that_no_file_can_hold_is_refused_at_once() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Typed(Method):
        name: ClassVar[str] = "typed"
        kind: Any = torch.bfloat16

    message = r"kind=torch\.bfloat16 of the method 'typed' is a dtype, which no file"
    with pytest.raises(ValueError, match=message):
        loradrop.inject(make_model(), config(Typed()))


def bank_of_two(targets: Any, scaling: Any, likes: Any) -> Any:
    return LoRABank(targets[:2], scaling[:2], likes[:2])


class Wide(LoRABank):
    def factors(self, i: int) -> Any:
        A, B = super().factors(i)
        return A.repeat(2, 1), B


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda *_: None, "returned None: return a loradrop.AdapterBank"),
        (bank_of_two, "make it for .*, in this order"),
        (Wide, r"factors\(0\), of .*query, are A \(8, 32\) and B \(32, 4\): make A \(r, 32\)"),
    ],
    ids=["nothing", "two", "wide"],
)
def test_a_bank_that_is_none_is_named(make: Any, message: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd(Method):
        name: ClassVar[str] = "odd"

        def bank(self, *given: Any) -> Any:
            return make(*given)

    with pytest.raises((TypeError, ValueError), match=message):
        loradrop.inject(make_model(), config(Odd()))


# ---- What goes into `fit` ----------------------------------------------------------------------


def test_first_arguments_of_another_kind() -> None:
    with pytest.raises(TypeError, match="model='roberta-base' is a str: give the model itself"):
        loradrop.fit("roberta-base", ROWS, None, config(methods.LoRA()))  # type: ignore[arg-type]
    for path in ("reviews.csv", Path("reviews.csv")):
        with pytest.raises(TypeError, match=r"train='reviews\.csv' is a path: give the rows"):
            loradrop.fit(make_model(), path, None, config(LoRADrop(keep=1)), args=ARGS)
    with pytest.raises(TypeError, match="scores is a dict: give the Scores that loradrop"):
        loradrop.select({"a": 1.0}, 0.9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scores is a BertForSequenceClassification"):
        loradrop.spectrum(make_model())  # type: ignore[arg-type]


def test_a_metric_returns_names_and_numbers(tmp_path: Path) -> None:
    import numpy as np

    def metric(prediction: Any) -> Mapping[str, Any]:
        return {"confusion": np.zeros((2, 2)), "right": np.float32(0.5)}

    model, args = make_model(), replace(ARGS, steps=2, save_every=99)
    result = loradrop.fit(model, ROWS, ROWS, config(methods.LoRA()), args=args, metric=metric)
    assert result.metrics["confusion"] == [[0.0, 0.0], [0.0, 0.0]]
    assert result.metrics["right"] == 0.5
    seen: list[bool] = []

    def in_batches(prediction: Any, compute_result: bool) -> Any:
        seen.append(compute_result)
        return {"batches": np.int64(len(seen))} if compute_result else None

    batchwise = replace(args, extra={"batch_eval_metrics": True})
    result = loradrop.fit(
        make_model(), ROWS, ROWS, config(methods.LoRA()), args=batchwise, metric=in_batches
    )
    assert seen.count(True) == 1 and result.metrics["batches"] == len(seen) > 1
    with pytest.raises(TypeError, match=r"metric returned 0\.5, a float: return a dictionary"):
        loradrop.fit(
            make_model(), ROWS, ROWS, config(methods.LoRA()), args=args, metric=lambda _: 0.5,
            output_dir=tmp_path,
        )  # fmt: skip
    found = make_model()
    loradrop.load(found, tmp_path / "adapter")  # what was trained is there
