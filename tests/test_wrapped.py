"""Models with torch.compile, DDP or activation checkpointing around them or their parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, llama
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel
from training_runs import make_rows

import loradrop
from loradrop import LoRAConfig
from loradrop.injection import plan_of
from loradrop.wrapped import inner

CONFIG = LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def parts(around: Callable[[nn.Module], Any]) -> Callable[[Any], Any]:
    def wrap(model: Any) -> Any:
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = around(layer)
        return model

    return wrap


WRAPPERS = {
    "compiled": compiled,
    "compiled parts": parts(compiled),
    "checkpointed parts": parts(checkpoint_wrapper),
    "in parallel": DataParallel,
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return inner(model)(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("first", ["inject", "wrap"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_around_a_model_changes_no_name(wrapper: str, first: str, tmp_path: Path) -> None:
    """It saves, exports, checks, merges and is removed as the model alone would."""
    peft = pytest.importorskip("peft")
    plain, model = llama(), llama()
    model = model if first == "inject" else WRAPPERS[wrapper](model)
    bank = loradrop.inject(model, CONFIG)
    model = model if first == "wrap" else WRAPPERS[wrapper](model)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(0, 0.3)
        inner(model).model.norm.weight.add_(0.5)  # type: ignore[union-attr, operator]
    adapted = logits(model)
    scores = loradrop.probe(model, [{"input_ids": IDS}])
    assert min(scores.values()) > 0 and loradrop.select(scores, keep=1)
    loradrop.save(model, tmp_path / "native")
    loradrop.export(model, tmp_path / "peft")
    loradrop.export(model, tmp_path / "merged", "merged")
    loaded = llama()
    loradrop.load(loaded, tmp_path / "native")
    assert torch.equal(logits(loaded), adapted)
    assert plan_of(loaded).base["fingerprint"] == plan_of(model).base["fingerprint"]
    of_peft = peft.PeftModel.from_pretrained(llama(), tmp_path / "peft")
    torch.testing.assert_close(logits(of_peft), adapted, rtol=1e-4, atol=1e-4)
    merged = type(plain).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-4)
    batches = [{"input_ids": IDS}]
    assert loradrop.verify(model, tmp_path / "peft", batches).ok
    assert loradrop.verify(model, tmp_path / "merged", batches).ok
    with loradrop.disabled(model):
        assert torch.equal(logits(model), logits(plain))
    loradrop.merge(model, keep_original=True)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    loradrop.remove(model)
    assert torch.equal(logits(model), logits(plain))


def test_parts_that_are_trained_whole_inside_of_compiled_ones() -> None:
    """What they were before, buffers and all, comes back."""

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))

    model = made()
    model[1][0].weight.requires_grad_(False)
    model[1] = compiled(model[1])
    loradrop.inject(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.train()(torch.randn(4, 6))
    model[0].weight.data.copy_(made()[0].weight)
    model[0].bias.data.copy_(made()[0].bias)
    loradrop.remove(model)
    model[1] = inner(model[1])
    for key, tensor in made().state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert not model[1][0].weight.requires_grad and model[1][0].bias.requires_grad


def test_compiled_code_follows_an_injection() -> None:
    model = llama()
    outer = compiled(model)
    before = outer(input_ids=IDS).logits
    bank = loradrop.inject(outer, CONFIG)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(0, 0.3)
    assert not torch.allclose(outer(input_ids=IDS).logits, before)
    torch.testing.assert_close(outer(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_fit_takes_the_model_inside() -> None:
    with pytest.raises(ValueError, match=r"model is a OptimizedModule: .*torch_compile"):
        loradrop.fit(compiled(llama()), make_rows(), None, CONFIG)


class FullyShardedDataParallel(nn.Module):
    """Named as FSDP1's, by which it is known."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._fsdp_wrapped_module(*args, **kwargs)


@pytest.mark.parametrize("around", [FullyShardedDataParallel, parts(FullyShardedDataParallel)])
def test_fsdp1_holds_the_adapters(around: Callable[[Any], Any], tmp_path: Path) -> None:
    """They train, and what would read or change them says why not."""
    model = llama()
    loradrop.inject(model, CONFIG)
    wrapped = around(model)
    wrapped(input_ids=IDS).logits.sum().backward()
    assert all(B.grad is not None for B in model.lora_bank.B)
    batches = [{"input_ids": IDS}]
    for verb in (
        lambda: loradrop.save(wrapped, tmp_path),
        lambda: loradrop.export(wrapped, tmp_path),
        lambda: loradrop.probe(wrapped, batches),
        lambda: loradrop.share(wrapped, []),
    ):
        with pytest.raises(ValueError, match=r"the model is under FSDP1 .*FSDP2 .* is served"):
            verb()
