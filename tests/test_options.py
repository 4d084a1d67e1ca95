"""Options of a wrong kind are named from Python, too; numbers of NumPy and torch are taken."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Optional

import numpy as np
import pytest
import torch
from every_method import EVERY, net

from loradrop import LoRAConfig, LoRADrop, TrainConfig
from loradrop.command.run_config import _build
from loradrop.methods import Method
from loradrop.methods.mos import MoS
from loradrop.methods.nb_lora import NBLoRA
from loradrop.methods.prilora import PRILoRA
from loradrop.methods.prolora import PRoLoRA
from loradrop.methods.rasa import RaSA
from loradrop.methods.vera import VeRA
from loradrop.options import kinds_in

if TYPE_CHECKING:
    from nowhere import Thing

WRONG: dict[Any, list[Any]] = {
    bool: ["false", 1, None],
    int: ["1", True, 1.5, np.array([1, 2])],
    float: ["0.1", True, [0.1], torch.ones(2)],
    str: [1, True, ["a"]],
}
OF_RUNS = [LoRAConfig(), TrainConfig()]


@pytest.mark.parametrize(
    "options", [*EVERY.values(), *OF_RUNS], ids=[*EVERY, "LoRAConfig", "TrainConfig"]
)
def test_an_option_of_a_wrong_kind_is_named(options: Any) -> None:
    for field in dataclasses.fields(options):
        kinds = {*kinds_in(field.type)} - {type(None)}
        for value in WRONG.get(kinds.pop(), []) if len(kinds) == 1 else []:
            with pytest.raises(ValueError, match=rf"^{field.name}=.+: (choose|give|the rank) "):
                type(options)(**{field.name: value})


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"from outside"}))
def test_a_number_that_no_tensor_and_no_seed_takes_is_named(name: str) -> None:
    method = EVERY[name]
    for field in dataclasses.fields(method):
        kinds = {*kinds_in(field.type)}
        wrong = [math.nan, math.inf, -math.inf] * (float in kinds) + [1 << 70] * (int in kinds)
        for value in wrong:
            with pytest.raises(ValueError, match=rf"^{field.name}=.+: choose "):
                type(method)(**{field.name: value})


@pytest.mark.parametrize("seed", [(1 << 64) - 1, -(1 << 63)])
def test_the_ends_of_what_a_seed_can_be(seed: int) -> None:
    assert net(VeRA(seed=seed)).lora_bank.A.isfinite().all()
    for beyond in ((1 << 64), -(1 << 63) - 1):
        with pytest.raises(ValueError, match=rf"seed={beyond}: choose a whole number of 64 bits"):
            MoS(seed=beyond)


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (LoRAConfig, {"use_rslora": "false"}, "use_rslora='false': give True or False"),
        (LoRAConfig, {"strict": "no"}, "strict='no': give True or False"),
        (LoRAConfig, {"lora_dropout": "0.1"}, r"lora_dropout='0\.1': give a number"),
        (LoRAConfig, {"alpha_pattern": {"q": True}}, "q=True: choose a positive number"),
        (PRILoRA, {"regrow": "false"}, "regrow='false': give True or False"),
        (LoRADrop, {"threshold": "0.9"}, r"threshold='0\.9': give a number or None"),
        (TrainConfig, {"steps": "9"}, "steps='9': give a whole number or None"),
        (NBLoRA, {"s": "1"}, "s='1': give a number or a list of numbers"),
        (NBLoRA, {"s": [1, "a"]}, r"s=\[1, 'a'\]: give a number or a list of numbers"),
    ],
)
def test_what_to_give_instead(cls: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**given)


def test_numbers_of_other_libraries_become_ours() -> None:
    config = LoRAConfig(
        r=4, lora_alpha=np.float32(2), use_rslora=np.True_, lora_dropout=0,
        method=NBLoRA(s=torch.tensor([1.0, 0.5, 0.5, 0.25])),
    )  # fmt: skip
    assert config == LoRAConfig(
        r=4, lora_alpha=2, use_rslora=True, method=NBLoRA(s=(1, 0.5, 0.5, 0.25))
    )
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig(epochs=2, learning_rate=np.float64(1e-3), steps=torch.tensor(3)) == (
        TrainConfig(epochs=2.0, learning_rate=1e-3, steps=3)
    )
    assert type(LoRADrop(threshold=np.float32(0.5)).threshold) is float


def test_whole_numbers_of_numpy_and_torch() -> None:
    whole = np.int64(4)
    config = LoRAConfig(r=whole, rank_pattern={"q": whole}, alpha_pattern={"q": np.float32(2)})
    ours = LoRAConfig(r=4, rank_pattern={"q": 4}, alpha_pattern={"q": 2})
    assert config.to_dict() == ours.to_dict()
    json.dumps(config.to_dict())
    drop = LoRADrop(keep=whole, share="interval", interval=torch.tensor(2))
    assert drop == LoRADrop(keep=4, share="interval", interval=2) and type(drop.keep) is int
    for made in (RaSA(k=whole), PRoLoRA(m=whole, n=whole, u=np.int32(1))):
        assert all(type(value) is int for value in vars(made).values())


@dataclass(frozen=True, kw_only=True)
class Own(Method):
    """A method of another package, with annotations of all sorts."""

    name: ClassVar[str] = "own"
    thing: "Thing | None" = None
    late: "int" = 1
    mode: Literal["a", "b"] = "a"
    names: Sequence[str] = ()
    tensor: torch.Tensor | None = None
    maybe: Optional[int] = None  # noqa: UP045 - as many write it
    count: int = 1
    ends: tuple[int, ...] = (1, 2)


def test_annotations_that_are_not_known() -> None:
    tensor = torch.ones(2)
    made = Own(thing=3, late="late", mode="c", names={"x"}, tensor=tensor, ends=[3, 4])
    assert made.tensor is tensor and made.names == {"x"} and made.ends == (3, 4)
    for given in ({"count": "1"}, {"maybe": "1"}, {"ends": [0.5]}):
        with pytest.raises(ValueError, match=r"give a (whole number|list of whole numbers)"):
            Own(**given)
    assert _build(Own, {"mode": "b", "thing": 1}, "method") == Own(mode="b", thing=1)
    with pytest.raises(ValueError, match=r"method\.maybe='x': give a whole number or null"):
        _build(Own, {"maybe": "x"}, "method")


def test_what_transformers_takes_is_taken() -> None:
    """Parts of a run for steps, as `fit` hands them over from TrainingArguments."""
    config = TrainConfig(log_every=0.1, save_every=0.25, eval_every=0.5, max_grad_norm=None)
    assert (config.log_every, config.save_every, config.max_grad_norm) == (0.1, 0.25, None)
