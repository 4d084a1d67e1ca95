"""Removal and merging: all can be undone, and merging rounds once."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Make, assert_same, snapshot, wake
from surgery_models import (
    CLOSE,
    IDS,
    WIDTH,
    Net,
    R,
    Tied,
    config,
    each_model,
    injected,
    output,
    train,
)
from torch import Tensor, nn
from torch.nn.utils import prune

import loradrop
from loradrop.layers import LoRALinear

pytestmark = pytest.mark.numbers


@each_model
def test_remove_restores_the_model(make: Make, targets: list[str]) -> None:
    model = make()
    next(iter(model.parameters())).requires_grad_(False)
    expected, before = output(model), snapshot(model)
    loradrop.inject(model, config(*targets))
    train(model)
    assert not torch.equal(output(model), expected)
    loradrop.remove(model)
    assert_same(model, before)
    assert torch.equal(output(model), expected)
    with pytest.raises(ValueError, match="inject"):
        loradrop.remove(model)
    loradrop.inject(model, config(*targets))
    assert torch.equal(output(model), expected)


def test_remove_restores_buffers_that_training_moved() -> None:
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
    before = snapshot(model)
    loradrop.inject(model, config("1"))
    model.train()(torch.randn(6, WIDTH) + 3.0)
    loradrop.remove(model)
    assert_same(model, before)


def test_running_means_of_the_frozen_base_do_not_move(caplog: pytest.LogCaptureFixture) -> None:
    """So what is saved computes what was trained, and `disabled` the base; those of what is trained
    whole move, and a model without adapters again moves all.
    """

    def made() -> Any:
        torch.manual_seed(0)
        layers = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        return nn.Sequential(*layers)

    model, x = made(), torch.randn(6, WIDTH) + 3.0
    loradrop.inject(model, config("1", modules_to_save=["2"]))
    wake(model, 0.25).train()(x)
    model(x / 0.0)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        "the running means of 0 stay as they are, as the base is frozen: to train and save them, "
        "name these modules in modules_to_save"
    ]
    assert torch.equal(model[0].running_mean, made()[0].running_mean)
    assert not torch.equal(model[2].running_mean, made()[2].running_mean)
    with loradrop.disabled(model):
        assert torch.equal(model.eval()(x), made().eval()(x))
    loradrop.remove(model)
    model.train()(x)
    assert not torch.equal(model[0].running_mean, made()[0].running_mean)


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_come_back(persistent: bool) -> None:
    """Those that no state dict has, too."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("seen", torch.zeros(()), persistent=persistent)

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return self.linear(x)

    model = Counts()
    loradrop.inject(model, config("linear"))
    model(torch.randn(2, WIDTH))
    assert float(model.seen) == 1.0
    loradrop.remove(model)
    assert float(model.seen) == 0.0


@each_model
def test_merge_computes_what_the_adapters_did(make: Make, targets: list[str]) -> None:
    model = make()
    before = snapshot(model)
    loradrop.inject(model, config(*targets, lora_alpha=7))
    adapted = output(wake(model, 0.25))
    loradrop.merge(model)
    torch.testing.assert_close(output(model), adapted, **CLOSE)
    after = snapshot(model)
    state, was = after.pop("state"), before.pop("state")
    assert list(state) == list(was)
    assert (after["classes"], after["identity"]) == (before["classes"], before["identity"])
    assert not {"lora_bank", "save_pretrained"} & {*model.__dict__, *model._modules}
    changed = {k for k, v in state.items() if not torch.equal(v, was[k])}
    assert changed and all(k.endswith(".weight") for k in changed)
    with pytest.raises(ValueError, match="keep_original"):
        loradrop.remove(model)


@pytest.mark.parametrize("how", ["group", "none"])
def test_shared_and_dropped_adapters(how: str) -> None:
    model = Net()
    before = snapshot(model)
    loradrop.inject(model, config())
    loradrop.share(model, ["layers.1.value"], share=how)
    merged = wake(copy.deepcopy(model), 0.25)
    adapted = output(merged)
    loradrop.merge(merged)
    torch.testing.assert_close(output(merged), adapted, **CLOSE)
    weight = "layers.0.query.weight"
    assert torch.equal(merged.state_dict()[weight], before["state"][weight]) == (how == "none")
    train(model)
    loradrop.remove(model)
    assert_same(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(WIDTH, 5, r=R, lora_alpha=7, dtype=dtype)
    wake(layer, 0.25)
    A, B = (factor.detach().double() for factor in layer.lora_bank.factors(0))
    exact = layer.weight.detach().double() + 7 / R * B @ A
    loradrop.merge(layer)
    assert layer.weight.dtype == dtype
    limit = exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-6
    assert ((layer.weight.double() - exact).abs() <= limit).all()


def test_merge_can_be_undone() -> None:
    model = Net()
    before = snapshot(model)
    loradrop.inject(model, config())
    adapted = output(wake(model, 0.25))
    loradrop.merge(model, keep_original=True)
    torch.testing.assert_close(output(model), adapted, **CLOSE)
    assert not torch.equal(model.layers[0].query.weight, before["state"]["layers.0.query.weight"])
    with pytest.raises(ValueError, match="merged"):
        loradrop.merge(model)
    with pytest.raises(ValueError, match="merged"), loradrop.disabled(model):
        pass
    with pytest.raises(ValueError, match="merged"):
        loradrop.probe(model, [IDS])
    twin = copy.deepcopy(model)
    for each in (twin, model):
        loradrop.remove(each)
        assert torch.equal(output(each), output(Net()))
    assert_same(model, before)


def test_merge_then_inject_again() -> None:
    model = injected()
    loradrop.merge(model)
    before, merged = snapshot(model), output(model)
    loradrop.inject(model, config("mix"))
    assert torch.equal(output(model), merged)
    train(model)
    loradrop.remove(model)
    assert_same(model, before)


@pytest.mark.parametrize("targets", [["first", "second"], ["second"]], ids=str)
def test_tied_weights_are_not_merged(targets: list[str]) -> None:
    model = Tied()
    with pytest.raises(ValueError, match=r"is tied.*second|second is tied"):
        loradrop.inject(model, config(*targets))
        loradrop.merge(wake(model))
    torch.testing.assert_close(model.first.weight, Tied().first.weight, rtol=0, atol=0)


def normed(module: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(module)


def pruned(module: nn.Linear) -> None:
    prune.l1_unstructured(module, "weight", 0.5)


@pytest.mark.parametrize("change", [normed, nn.utils.spectral_norm, pruned])
def test_computed_weights_are_not_merged(change: Callable[[nn.Linear], Any]) -> None:
    net = Net()
    change(net.layers[1].mix)
    loradrop.inject(net, config("mix"))
    before = snapshot(wake(net))
    with pytest.raises(ValueError, match=r"weight of layers\.1\.mix is computed.*would be lost"):
        loradrop.merge(net)
    assert_same(net, before)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, math.inf), (torch.float16, 1e6)])
def test_a_merge_that_is_not_finite_changes_nothing(dtype: torch.dtype, size: float) -> None:
    net = injected("mix")
    net.to(dtype)
    net.lora_bank.float()
    wake(net)
    net.lora_bank.B[1].data *= size
    before = snapshot(net)
    with pytest.raises(ValueError, match=rf"layers\.1\.mix is not finite in {dtype}"):
        loradrop.merge(net)
    assert_same(net, before)


def test_what_is_asked_of_a_merged_model(tmp_path: Path) -> None:
    """Its adapters are gone, and injecting new ones, as for a base model, would not bring them."""
    model = injected()
    loradrop.merge(model)
    for ask in (lambda: loradrop.save(model, tmp_path), lambda: loradrop.probe(model, [IDS])):
        with pytest.raises(ValueError, match=r"merged into its weights.*keep_original=True"):
            ask()


def test_disabled_is_the_base_and_ends_with_the_block() -> None:
    model, base = injected(), output(Net())
    adapted = output(model)
    assert not torch.equal(adapted, base)
    with loradrop.disabled(model):
        assert torch.equal(output(model), base)
        with loradrop.disabled(model):
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), adapted)
    with pytest.raises(KeyError), loradrop.disabled(model):
        raise KeyError
    assert torch.equal(output(model), adapted)
