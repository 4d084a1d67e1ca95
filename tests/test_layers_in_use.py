"""The layers under accelerate's hooks, and in language models of transformers."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from layer_cases import K, inject
from models import Make, Net, gpt2, llama, wake
from torch import Tensor, nn

import loradrop

pytestmark = pytest.mark.numbers


# accelerate's hooks, which give each module a forward of its own


def hooked(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            accelerate.hooks.add_hook_to_module(module, AlignDevicesHook("cpu"))


def unhooked(model: nn.Module) -> None:
    hooked(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


def dispatched(model: nn.Module) -> None:
    parts = {name: "cpu" for name, _ in model.named_children()}
    accelerate.dispatch_model(model, parts, main_device="cpu", force_hooks=True)


def offloaded(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def preloaded(model: nn.Module) -> None:
    cpu = torch.device("cpu")
    accelerate.cpu_offload(model, execution_device=cpu, preload_module_classes=["Layer"])


def on_disk(model: nn.Module) -> None:
    folder = tempfile.TemporaryDirectory()
    model.folder = folder  # it lives as long as the model
    accelerate.disk_offload(model, folder.name, execution_device=torch.device("cpu"))


OFFLOADS = [offloaded, preloaded, on_disk]
HOOKS = [hooked, unhooked, dispatched, *OFFLOADS]


@pytest.mark.parametrize("first", [True, False], ids=["hooks first", "adapters first"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_accelerate(hook: Callable[[nn.Module], None], first: bool, tmp_path: Any) -> None:
    """The same as without them; where weights are offloaded, merge and its like refuse."""
    x, plain, model = torch.randn(3, K), Net(), Net()
    inject(plain, "query", "value", lora_alpha=6)
    expected = wake(plain)(x).detach()
    if first:
        hook(model)
    inject(model, "query", "value", lora_alpha=6)
    if not first:
        hook(model)
    bank = loradrop.bank.bank_of(model)
    with torch.no_grad():
        for mine, theirs in zip(bank.parameters(), plain.lora_bank.parameters(), strict=True):
            mine.copy_(theirs)
    assert bank.device.type == "cpu"
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in bank.parameters())
    loradrop.save(model, tmp_path)
    loradrop.load(model, tmp_path)
    assert torch.equal(model(x), expected)
    if hook in OFFLOADS:
        with pytest.raises(ValueError, match=r"layers\.0\.query\.weight is offloaded"):
            loradrop.merge(model)
    else:
        loradrop.merge(model, keep_original=True)
        torch.testing.assert_close(model(x), expected)
    loradrop.remove(model)
    assert torch.equal(model(x), Net()(x))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), Net()(x))


@pytest.mark.parametrize("hook", OFFLOADS)
def test_an_optimiser_of_adapters_that_are_offloaded(hook: Callable[[nn.Module], None]) -> None:
    """They come back with the first forward pass, and are what it holds."""
    x, plain, model = torch.randn(3, K), Net(), Net()
    for each in (plain, model):
        inject(each, "query", "value", lora_alpha=6)
    model.load_state_dict(wake(plain).state_dict())
    hook(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = model(x)
    assert torch.equal(before, plain(x))
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert {id(p) for p in loradrop.bank.bank_of(model).parameters()} <= held
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)


# Language models


MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
}
TEXT = torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(0))
each_model = pytest.mark.parametrize(("make", "targets"), MODELS.values(), ids=MODELS)


def continued(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **options
    )


@each_model
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_with_cache(make: Make, targets: list[str], batch: int) -> None:
    model, ids = make().double(), TEXT[:batch]  # double: no rounding decides a tie of two tokens
    base = continued(model, ids)
    inject(model, *targets)
    assert torch.equal(continued(model, ids), base)
    adapted = continued(wake(model, 0.5), ids)
    assert adapted.shape == (batch, 18) and not torch.equal(adapted, base)
    assert torch.equal(continued(model, ids, use_cache=False), adapted)
    with torch.inference_mode():
        assert torch.equal(continued(model, ids), adapted)
    with loradrop.disabled(model):
        assert torch.equal(continued(model, ids), base)
    assert torch.equal(continued(model, ids), adapted)
    merged = copy.deepcopy(model)
    loradrop.merge(merged)
    assert torch.equal(continued(merged, ids), adapted)
    loradrop.remove(model)
    assert torch.equal(continued(model, ids), base)


@each_model
def test_definition_of_conv1d_and_linear(make: Make, targets: list[str]) -> None:
    model = make()
    bank = inject(model, *targets, lora_alpha=6)
    wake(model)
    for i, target in enumerate(bank.targets):
        layer = model.get_submodule(target.name)
        weight = layer.weight.T if "c_" in target.name else layer.weight
        x = torch.randn(2, 3, target.in_features)
        A, B = bank.factors(i)
        expected = nn.functional.linear(x, weight, layer.bias) + 1.5 * x @ A.T @ B.T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@each_model
def test_gradient_checkpointing_of_transformers(make: Make, targets: list[str]) -> None:
    outcomes = []
    for reentrant in (None, True, False):
        model = make()
        inject(model, *targets, lora_dropout=0.3)
        wake(model, 0.1)
        if reentrant is not None:
            model.enable_input_require_grads()
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(5)
        loss = model(input_ids=TEXT, labels=TEXT, use_cache=False).loss
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.lora_bank.parameters())])
    plain, *others = outcomes
    assert all(tensor.any() for tensor in plain)
    assert all(all(map(torch.equal, plain, other)) for other in others)
