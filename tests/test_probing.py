"""Scores are Σ‖s·B·A·x‖² over real tokens, as hooks find them. (Online: test_collector.py.)"""

import random
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import Net, R, bert, net, wake
from probe_cases import EXACT, Batch, batches, collecting, online, probed, step
from torch import Tensor, nn

import loradrop
from loradrop.injection import injection_of, plan_of

pytestmark = pytest.mark.numbers


def by_hooks(model: nn.Module, data: Iterable[Batch], masked: bool = True) -> dict[str, float]:
    """The definition: float64 products of every target's input, by forward hooks."""
    bank, totals, handles = model.lora_bank, {}, []
    current: list[Batch] = []

    def count(i: int, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor], __: Tensor) -> None:
            A, B = (factor.detach().double() for factor in bank.factors(i))
            delta = bank.scaling[i] * args[0].detach().double() @ A.T @ B.T
            per_token = delta.square().sum(-1)
            if masked:
                per_token = per_token[current[-1]["attention_mask"] == 1]
            totals[name] = totals.get(name, 0.0) + float(per_token.sum())

        return hook

    for i, target in enumerate(bank.targets):
        layer = model.get_submodule(target.name)
        handles.append(layer.register_forward_hook(count(i, target.name)))
    with torch.no_grad():
        for batch in data:
            current.append(batch)
            model(**batch)
    for handle in handles:
        handle.remove()
    return totals


# Offline


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "mask=None"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_probe_is_its_definition(dtype: torch.dtype, masked: bool) -> None:
    model, data = net().to(dtype), batches()
    expected = by_hooks(model, data, masked)
    scores = loradrop.probe(model, data, **({} if masked else {"mask": None}))
    assert list(scores) == [f"layers.{i}.{m}" for i in (0, 1) for m in ("query", "value")]
    assert dict(scores) == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert all(value > 0 for value in scores.values())
    real = sum(int(batch["attention_mask"].sum()) for batch in data)
    every = sum(batch["input_ids"].numel() for batch in data)
    assert scores.tokens == (real if masked else every) and real < every
    assert (scores.source, len(scores.rows), scores.rows.dtype) == ("offline", 4, torch.float64)
    assert injection_of(model).scores is scores


def test_probe_of_bert() -> None:
    model, data = bert(2), batches()
    targets = ["query", "value", "output.dense"]
    loradrop.inject(model, loradrop.LoRAConfig(r=R, target_modules=targets))
    expected = by_hooks(wake(model.double()), data)
    assert probed(model.train(), data) == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_mask_counts_every_token() -> None:
    model, data = net(), batches()
    every = loradrop.probe(model, data, mask=None)
    for bare in ([{"input_ids": b["input_ids"]} for b in data], [b["input_ids"] for b in data]):
        scores = loradrop.probe(model, bare)
        assert dict(scores) == dict(every) and scores.tokens == every.tokens


class Renamed(Net):
    def forward(self, ids: Tensor, real: Tensor) -> Tensor:
        return super().forward(ids)


KINDS: dict[str, Callable[[Batch], Any]] = {
    "dict": dict,
    "tuple": lambda b: tuple(b.values()),
    "list": lambda b: list(b.values()),
    "named tuple": lambda b: Pair(**b),
    "mask of bools": lambda b: b | {"attention_mask": b["attention_mask"].bool()},
    "other names": lambda b: {"ids": b["input_ids"], "real": b["attention_mask"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_batches(kind: str) -> None:
    model, data, options = net(), batches(), {}
    expected = probed(model, data)
    if kind == "other names":
        model.__class__, options = Renamed, {"mask": "real"}
    assert probed(model, (KINDS[kind](batch) for batch in data), **options) == expected


def test_padding_that_is_not_finite_is_left_out() -> None:
    model = net()
    padded = [
        (b["input_ids"].clamp_min(1) * b["attention_mask"], b["attention_mask"]) for b in batches()
    ]
    clean = probed(model, padded)
    model.embed.weight.data[0] = float("nan")
    assert probed(model, padded) == clean


Pair = namedtuple("Pair", ["input_ids", "attention_mask"])


def test_mask_fn_weighs_per_target() -> None:
    model, data = net().double(), batches()
    asked: list[str] = []

    def only_first_layer(name: str, x: Tensor, mask: Tensor | None) -> Tensor | None:
        assert mask is not None and x.shape[:-1] == mask.shape
        asked.append(name)
        return mask if "layers.0" in name else 0.5 * torch.ones(x.shape[:-1])

    real, every = by_hooks(model, data), by_hooks(model, data, masked=False)
    want = {name: real[name] if "layers.0" in name else 0.5 * every[name] for name in real}
    assert probed(model, data, mask_fn=only_first_layer) == pytest.approx(want, rel=1e-6)
    assert set(asked) == set(want)
    all_of_them = probed(model, data, mask_fn=lambda *_: None)
    assert all_of_them == pytest.approx(every, rel=1e-6)


class Packed(Net):
    """Its layers see the tokens of all sequences in one row."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids.flatten())


def test_tokens_in_one_row_keep_their_mask() -> None:
    model, data = net(), batches()
    expected = probed(model, data)
    model.__class__ = Packed
    assert probed(model, data) == pytest.approx(expected, rel=1e-5)
    by_row = probed(model, data, mask_fn=lambda _, x, mask: mask.flatten())
    assert by_row == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"mask_fn.*layers\.0\.query is \(2, 5\).*\(10, 12\)"):
        loradrop.probe(model, data, mask_fn=lambda _, x, mask: mask)
    listed = [b | {"attention_mask": b["attention_mask"].tolist()} for b in data]
    with pytest.raises(ValueError, match=r"attention_mask.*list"):
        loradrop.probe(net(), listed)


class Partly(Net):
    """Never calls the value of its last layer."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.layers[0](self.embed(input_ids))
        return self.layers[1].query(x)


def test_a_target_that_is_never_called_is_named() -> None:
    model = net()
    model.__class__ = Partly
    with pytest.raises(RuntimeError, match=r"forward of layers\.1\.value was never called"):
        loradrop.probe(model, batches())
    with collecting(model) as collector, pytest.raises(RuntimeError, match=r"layers\.1\.value was"):
        step(model, batches()[0]).backward()
        collector.close_row()
        collector.require_called()


def test_a_target_that_no_input_reaches_is_worth_nothing_where_that_is_allowed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net()
    model.__class__ = Partly
    injection_of(model).config = replace(injection_of(model).config, strict=False)
    wake(model)
    scores = loradrop.probe(model, batches(), gram=True)
    assert "the forward of layers.1.value was never called so far" in caplog.text
    for metric in ("loss", "output"):
        found = loradrop.spectrum(scores, metric)
        assert set(found["layers.1.value"]) == {0.0} and found.total > 0
    loradrop.truncate(model, loradrop.allocate(found, budget=0.5))
    assert model.lora_bank.targets[-1].name == "layers.1.value"
    assert model.lora_bank.factors(len(model.lora_bank.targets) - 1) is None


def test_a_target_that_no_input_reaches_stops_no_adapter_that_is_trained(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its configuration cannot be changed any more."""
    model = net()
    model.__class__ = Partly
    injection_of(model).plan = plan_of(model)
    assert dict(loradrop.probe(model, batches()))["layers.1.value"] == 0.0
    assert "the forward of layers.1.value was never called so far" in caplog.text


def test_a_target_that_is_called_now_and_then_counts_zero_where_it_is_not() -> None:
    model, data = net(), batches()
    whole = loradrop.probe(model, data)

    def some() -> Iterable[Batch]:
        for i, batch in enumerate(data):
            model.__class__ = Partly if i % 2 else Net
            yield batch

    scores = loradrop.probe(model, some())
    want = whole.rows.clone()
    want[1::2, -1] = 0.0
    torch.testing.assert_close(scores.rows[:, [0, 3]], want[:, [0, 3]], **EXACT)


def test_everything_is_as_before() -> None:
    model = net(lora_dropout=0.5)
    model.train()
    model.layers[1].eval()
    model(**batches()[0]).sum().backward()

    def hooks_of(module: nn.Module) -> tuple[Any, Any]:
        return module._forward_hooks, module._forward_pre_hooks

    def state() -> list[Any]:
        return [
            [(m.training, *map(len, hooks_of(m))) for m in model.modules()],
            {k: v.clone() for k, v in model.state_dict().items()},
            {k: (p.requires_grad, p.grad) for k, p in model.named_parameters()},
            (random.getstate(), torch.get_rng_state(), np.random.get_state()[1]),
            model.lora_bank.collector,
        ]

    def drawing() -> Iterable[Batch]:
        for batch in batches():
            random.random(), np.random.rand(), torch.rand(1)
            assert not any(module.training for module in model.modules())
            yield batch

    before = state()
    first = probed(model, drawing())
    flat = (torch.utils._pytree.tree_leaves(leaves) for leaves in (before, state()))
    for one, two in zip(*flat, strict=True):
        same = torch.equal if isinstance(one, Tensor) else np.array_equal
        assert same(one, two)
    assert probed(model, drawing()) == first
    with pytest.raises(ZeroDivisionError):
        loradrop.probe(model, (1 / 0 for _ in range(3)))
    assert state()[0] == before[0] and model.lora_bank.collector is None


def test_scores_that_say_nothing_are_refused() -> None:
    model, fresh = net(), wake(net(), 0.0)
    with pytest.raises(ValueError, match="empty"):
        loradrop.probe(model, [])
    scores = loradrop.probe(fresh, batches())
    assert set(scores.values()) == {0.0}
    with pytest.raises(ValueError, match="B is still zero"):
        loradrop.select(scores, threshold=0.9)
    model.lora_bank.factors(2)[1].data[0, 0] = float("nan")
    scores = loradrop.probe(model, batches())
    assert scores["layers.0.query"] > 0 and scores["layers.1.query"] != scores["layers.1.query"]
    with pytest.raises(ValueError, match=r"layers\.1\.query is nan"):
        loradrop.select(scores, threshold=0.9)


@pytest.mark.parametrize("how", ["group", "none"])
def test_targets_that_share_are_measured_apart(how: str) -> None:
    model, data = net().double(), batches()
    loradrop.share(model, ["layers.0.query"], share=how)
    scores = loradrop.probe(wake(model), data)
    if how == "group":
        assert dict(scores) == pytest.approx(by_hooks(model, data), rel=1e-6)
        assert len(set(scores.values())) == 4
        torch.testing.assert_close(online(model, data).rows, scores.rows, **EXACT)
    else:
        assert [value > 0 for value in scores.values()] == [True, False, False, False]


def test_text_where_a_list_of_batches_belongs() -> None:
    """The remedy has a name, and the model is as it was."""
    model = bert()
    loradrop.inject(model, loradrop.LoRAConfig(r=R))
    wake(model).train()
    batch = {"input_ids": torch.tensor([[3, 4, 5]])}
    for wrong in (batch, UserDict(batch), "a text"):
        with pytest.raises(ValueError, match=r"batches is a (dict|UserDict|str).*\[batch\]"):
            loradrop.probe(model, wrong)
    for wrong in (["a text"], [{"input_ids": [[3, 4, 5]]}], [[[3, 4, 5]]]):
        with pytest.raises(ValueError, match=r"a batch is a \w+ without a tensor.*return_tensors"):
            loradrop.probe(model, wrong)
    with pytest.raises(ValueError, match=r"^You must specify"):  # the model's own, of tensors
        loradrop.probe(model, [{"wrong": batch["input_ids"]}])
    assert model.training and probed(model, [batch])
