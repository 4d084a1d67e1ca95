"""The bank: it owns every adapter once, wherever the model goes."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from models import wake
from torch import Tensor, nn

import loradrop
from loradrop.bank import AdapterBank, bank_of
from loradrop.layers import LoRALinear
from loradrop.scores import Assignment

pytestmark = pytest.mark.numbers

DEPTH, WIDTH, R = 4, 6, 2


class Tower(nn.Module):
    """Equal layers without nonlinearity, so that whole numbers stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(DEPTH):
            self.layers.append(nn.ModuleDict({"proj": nn.Linear(WIDTH, WIDTH)}))
        self.side = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.side(sum(layer.proj(x) for layer in self.layers))


def tower(kept: list[str] | None = None, **options: Any) -> tuple[Tower, AdapterBank]:
    """Injected in all layers with B away from zero; shared if `kept` is given."""
    torch.manual_seed(0)
    model = Tower()
    config = loradrop.LoRAConfig(r=R, target_modules=["proj", "side"], **options)
    loradrop.inject(model, config)
    if kept is not None:
        loradrop.share(model, kept)
    return wake(model), model.lora_bank


def storages(bank: AdapterBank) -> list[int]:
    return [tensor.untyped_storage().data_ptr() for tensor in (*bank.A, *bank.B)]


def test_targets_slots_and_factors() -> None:
    model, bank = tower()
    assert bank_of(model) is bank is model.lora_bank
    names = [f"layers.{i}.proj" for i in range(DEPTH)] + ["side"]
    assert [target.name for target in bank.targets] == names
    assert bank.slots == tuple(range(DEPTH + 1)) == tuple(map(bank.index, names))
    for i, target in enumerate(bank.targets):
        module = model.get_submodule(target.name)
        assert (target.in_features, target.out_features) == tuple(module.weight.T.shape)
        assert (target.kind, target.r) == (target.name.rpartition(".")[2], R)
        A, B = bank.factors(i)
        assert A is bank.A[i] and B is bank.B[i]
        assert isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter)
        assert (A.shape, B.shape) == ((R, WIDTH), (target.out_features, R))
        assert A.dtype == B.dtype == torch.float32
    assert not list(bank.buffers())  # they would be broadcast from rank 0 and cast with the model


def test_refusals() -> None:
    _, bank = tower()
    with pytest.raises(KeyError, match=r"layers\.9.*layers\.0\.proj"):
        bank.index("layers.9")
    with pytest.raises(ValueError, match=r"Tower.*inject"):
        bank_of(Tower())
    with pytest.raises(ValueError, match=r"slot 0.*side"):
        bank.assign(Assignment(bank.targets, (0,) * (DEPTH + 1)), [(bank.A[0], bank.B[0])])


def test_delta_is_what_the_layer_adds() -> None:
    model, bank = tower(lora_alpha=5)
    x, layer, delta = torch.randn(7, WIDTH), model.layers[2].proj, bank.delta(2)
    added = layer(x) - nn.functional.linear(x, layer.weight, layer.bias)
    assert (delta.shape, delta.dtype, delta.requires_grad) == ((WIDTH, WIDTH), torch.float32, False)
    torch.testing.assert_close(delta, 2.5 * bank.B[2].detach() @ bank.A[2].detach())
    torch.testing.assert_close(added, x @ delta.T, rtol=1e-5, atol=1e-5)
    assert model.double() is model and bank.delta(2).dtype == torch.float64


# Sharing


def test_a_shared_adapter_is_stored_once() -> None:
    model, bank = tower([])
    first = [bank.factors(i)[0] is bank.factors(0)[0] for i in range(DEPTH + 1)]
    assert first == [*[True] * DEPTH, False] and len(bank.A) == len(bank.B) == 2
    adapters = [key for key in model.state_dict() if key.startswith("lora_bank.")]
    parts = ("_extra_state", "pairs.0.A", "pairs.0.B", "pairs.1.A", "pairs.1.B")
    assert adapters == [f"lora_bank.{part}" for part in parts]
    assert len(set(storages(bank))) == 4
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == R * (2 * WIDTH + WIDTH + 3)


def test_a_shared_adapter_gets_the_sum_of_its_gradients() -> None:
    """Against an unshared copy of equal values; whole numbers sum exactly in any order."""
    model, bank = tower([])
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randint(-3, 4, tensor.shape))
    unshared = copy.deepcopy(model)
    own, every = unshared.lora_bank, range(DEPTH + 1)
    pairs = [tuple(factor.detach().clone() for factor in own.factors(i)) for i in every]
    own.assign(Assignment(own.targets, tuple(every)), pairs)
    x = torch.randint(-3, 4, (11, WIDTH), generator=torch.Generator().manual_seed(1)).float()
    for each in (model, unshared):
        each(x).square().sum().backward()
    for shared, single in ((bank.A[0], own.A), (bank.B[0], own.B)):
        assert shared.grad.abs().max() > 0 and all(p.grad.abs().max() > 0 for p in single)
        assert torch.equal(shared.grad, sum(parameter.grad for parameter in single[:DEPTH]))


def test_sharing_again_never_aliases() -> None:
    """What one slot held for many targets must not become one Parameter under many slots."""
    model, bank = tower([])
    every = [target.name for target in bank.targets]
    loradrop.share(model, every, after_select="continue")
    assert len(set(bank.slots)) == DEPTH + 1
    assert len(set(storages(bank))) == len(bank.A) + len(bank.B) == 2 * (DEPTH + 1)


def test_sharing_after_everything_was_dropped() -> None:
    model, bank = tower()
    loradrop.share(model, [], share="none")
    assert bank.slots == (None,) * (DEPTH + 1)
    assert bank.factors(0) is None and bank.delta(0) is None
    assert not [p for p in model.parameters() if p.requires_grad]
    loradrop.share(model, ["side"])
    assert None not in bank.slots
    A, B = bank.factors(DEPTH)
    assert (A.shape, B.shape) == ((R, WIDTH), (3, R))


# Copies


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("kept", [None, ["side", "layers.1.proj"]], ids=["own", "shared"])
def test_a_copy_has_its_own_bank(how: Any, kept: list[str] | None) -> None:
    model, bank = tower(kept)
    x = torch.randn(5, WIDTH)
    expected = model(x).detach()
    twin = how(model)
    other = bank_of(twin)
    assert other is not bank and not set(storages(bank)) & set(storages(other))
    linears = [block.proj for block in twin.layers] + [twin.side]
    assert all(layer._lora.bank is other for layer in linears) and type(twin.side) is LoRALinear
    assert bank.slots == other.slots and bank.targets == other.targets
    assert torch.equal(twin(x), expected)
    assert not torch.equal(wake(twin, 0.0)(x), expected) and torch.equal(model(x), expected)
    twin(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_state_dict_goes_into_another_injected_model() -> None:
    (model, _), (other, _) = tower(), tower()
    for parameter in other.parameters():
        parameter.data.add_(1.0)
    x = torch.randn(5, WIDTH)
    assert not torch.equal(other(x), model(x))
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(other(x), model(x))


def kept(*which: int) -> Any:
    """A tower where these targets keep an adapter of their own, with values that tell."""
    model, bank = tower([f"layers.{i}.proj" for i in which])
    for i, B in enumerate(bank.B):
        nn.init.constant_(B, 1.0 + i)
    return model


def test_a_state_dict_knows_who_shares(caplog: pytest.LogCaptureFixture) -> None:
    model, other, x = kept(0), kept(1), torch.randn(5, WIDTH)
    before, parameters = model(x), list(other.lora_bank.parameters())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), before) and other.lora_bank.assignment.kept == ("layers.0.proj",)
    assert all(p is q for p, q in zip(parameters, other.lora_bank.parameters(), strict=True))
    for strict in (True, False):
        fresh, _ = tower()
        with pytest.raises(RuntimeError, match="other layers share in the state dict"):
            fresh.load_state_dict(model.state_dict(), strict=strict)
    fresh.lora_bank.adopts = True  # where no optimiser exists yet
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), before) and fresh.lora_bank.slots == model.lora_bank.slots
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("_extra_state")}
    kept(0).load_state_dict(old)
    assert "does not say which layers share" in caplog.text


def test_a_state_dict_of_other_targets_is_refused() -> None:
    model, _ = tower()
    state = model.state_dict()
    state["lora_bank._extra_state"][2] += 1
    with pytest.raises(RuntimeError, match="adapts other targets"):
        model.load_state_dict(state)


# Types


def dtypes(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()],
    ids=["to(bfloat16)", "bfloat16()", "half()"],
)
def test_adapters_stay_float32_on_a_half_base(cast: Any) -> None:
    model, bank = tower()
    before = copy.deepcopy(bank.state_dict())
    base = cast(model).layers[0].proj.weight.dtype
    assert base in (torch.bfloat16, torch.float16)
    assert dtypes(model.layers) == {base} and dtypes(bank) == {torch.float32}
    assert all(torch.equal(tensor, before[key]) for key, tensor in bank.state_dict().items())
    y = model(torch.randn(5, WIDTH, dtype=base))
    y.float().square().sum().backward()
    assert y.dtype == base
    assert all(f.grad.dtype == torch.float32 and f.grad.any() for f in bank.parameters())


@pytest.mark.parametrize("options", [{}, {"adapter_dtype": "base"}])
def test_adapters_made_on_a_half_base(options: dict[str, Any]) -> None:
    config = loradrop.LoRAConfig(r=R, target_modules=["side"], **options)
    dtype = torch.bfloat16 if options else torch.float32
    assert dtypes(loradrop.inject(Tower().bfloat16(), config)) == {dtype}


def test_adapters_follow_to_double_trainable_and_in_use() -> None:
    model, bank = tower()
    x = torch.randn(5, WIDTH)
    expected = model(x)
    model.double().to("cpu")
    assert dtypes(model) == dtypes(bank) == {torch.float64}
    y = model(x.double())
    torch.testing.assert_close(y.float(), expected)
    y.sum().backward()
    assert all(p.requires_grad and p.is_leaf and p.grad is not None for p in bank.parameters())
    for i in range(DEPTH + 1):
        assert bank.factors(i)[0] is bank.A[i] and bank.factors(i)[1] is bank.B[i]


def test_a_printed_model_shows_its_bank_in_one_line() -> None:
    (model, _), base = tower(["side"]), Tower()
    added = [line.strip() for line in str(model).splitlines() if "Bank" in line]
    assert added == [f"(lora_bank): LoRABank(targets={DEPTH + 1}, adapters=2)"]
    assert len(str(model).splitlines()) == len(str(base).splitlines()) + 1
