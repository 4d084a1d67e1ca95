"""The op in use: autocast, what it must not do, its refusals."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from op_cases import (
    DEVICE,
    EIGHTHS,
    HALF,
    SAME_BITS,
    SEED,
    SINKS,
    S,
    all_sinks,
    assert_each_within,
    draw,
    each_backend,
    each_dtype,
    each_size,
    kept,
    leaves,
    op,
    short,
    sink,
    through_op,
    torch_delta,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from loradrop.op.linear import lora_add, lora_linear
from loradrop.testing import AWKWARD, Shape

pytestmark = pytest.mark.numbers

# Autocast


def test_a_trainable_weight_under_autocast() -> None:
    """As a frozen one, and with its gradient."""
    t = draw(Shape(6, 16, 8, 4), torch.float32, 0)
    got = []
    for trained in (False, True):
        weight = t["weight"].detach().requires_grad_(trained)
        bias = t["bias"].detach().requires_grad_(trained)
        with torch.autocast(DEVICE, HALF):
            y = lora_linear(t["x"].to(HALF), weight, bias, t["A"], t["B"], S)
        assert y.dtype == HALF
        got.append(y.detach().float())
        if trained:
            y.float().square().sum().backward()
            assert weight.grad.any() and bias.grad.any()
    assert_close(*got, rtol=2e-2, atol=2e-2)


@each_backend
@each_size
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_autocast_does_what_autocast_does(backend: str, size: Shape, p: float) -> None:
    ours, pytorchs, exact = [], [], []
    for seed in range(6):
        t = draw(size, torch.float32, seed)
        for results, run in ((ours, "op"), (pytorchs, "torch"), (exact, "exact")):
            dtype = torch.float64 if run == "exact" else torch.float32
            d = {n: tensor.detach().to(dtype) for n, tensor in t.items()}
            inputs = leaves(d)
            with torch.autocast(DEVICE, HALF, enabled=run != "exact"):
                if run == "op":
                    y = op(d, backend, p)
                else:
                    y = F.linear(d["x"], d["weight"], d["bias"])
                    y = y + torch_delta(d["x"], d["A"], d["B"], S, kept(d, p), p)
            assert y.dtype == (torch.float64 if run == "exact" else HALF)
            grads = torch.autograd.grad(y, inputs, d["dy"].to(y.dtype))
            assert all(g.dtype == dtype for g in grads)
            results.append([y.detach(), *grads])
    m, k, n, r = size
    assert_each_within(ours, pytorchs, exact, (k + r, n + r, m + n, m + k))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=short)
def test_autocast_around_backward_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """The forward decides; a loss.backward() inside the block computes what one outside does."""
    t = draw(AWKWARD["rank 8"], dtype)
    inputs = leaves(t)
    y = op(t, backend, 0.25)
    with torch.autocast(DEVICE, HALF):
        inside = torch.autograd.grad(y, inputs, t["dy"])
    assert_close(inside, through_op(t, backend, 0.25)[1:4], **SAME_BITS)


def test_autocast_leaves_float64_alone() -> None:
    t = draw(AWKWARD["rank 4"], torch.float64)
    with torch.autocast(DEVICE, HALF):
        under = through_op(t, None, 0.0)
    assert_close(under, through_op(t, None, 0.0), **SAME_BITS)


def test_autocast_of_lora_add() -> None:
    t = draw(AWKWARD["rank 4"])
    with torch.autocast(DEVICE, HALF):
        y0 = F.linear(t["x"], t["weight"])
        assert lora_add(y0, t["x"], t["A"], t["B"], S).dtype == HALF
    with torch.autocast(DEVICE, enabled=False):
        assert lora_add(t["dy"], t["x"], t["A"], t["B"], S).dtype == torch.float32


# What it must not do


@each_backend
@each_dtype
@each_size
@pytest.mark.parametrize("entry", ["lora_linear", "lora_add"])
def test_nothing_is_mutated(entry: str, size: Shape, dtype: torch.dtype, backend: str) -> None:
    t = draw(size, dtype)
    weights = (torch.arange(size.m, device=DEVICE) % 2).float()
    t |= {"y0": t["dy"].clone()} if entry == "lora_add" else {}
    everything = [*t.values(), weights, SEED]
    before = [(tensor.clone(), tensor._version) for tensor in everything]
    inputs = leaves(t)
    y, _ = op(t, backend, 0.25, token_weights=weights, return_sqnorm=True)
    taken = {tensor.untyped_storage().data_ptr() for tensor in everything}
    assert y.untyped_storage().data_ptr() not in taken
    torch.autograd.grad(y, inputs, t["dy"])
    for tensor, (value, version) in zip(everything, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


@each_backend
def test_the_output_may_be_changed_in_place(backend: str) -> None:
    t = draw(AWKWARD["rank 8"])
    inputs = leaves(t)
    y = op(t, backend).mul_(2.0)
    grads = torch.autograd.grad(y, inputs, t["dy"])
    assert_close(grads, [2 * grad for grad in through_op(t, backend, 0.0)[1:4]])


@each_backend
def test_retain_graph_twice(backend: str) -> None:
    t = draw(AWKWARD["rank 8"])
    inputs = leaves(t)
    y = op(t, backend, 0.25)
    first = torch.autograd.grad(y, inputs, t["dy"], retain_graph=True)
    assert_close(torch.autograd.grad(y, inputs, t["dy"]), first, **SAME_BITS)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs, t["dy"])


@each_backend
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_double_backward(backend: str, p: float) -> None:
    """The gradients of gradients are those of plain PyTorch."""
    t, found = draw(AWKWARD["rank 8"]), []
    for run in ("op", "torch"):
        inputs = leaves(t)
        if run == "op":
            y = op(t, backend, p)
        else:
            y = F.linear(t["x"], t["weight"], t["bias"])
            y = y + torch_delta(t["x"], t["A"], t["B"], S, kept(t, p), p)
        firsts = torch.autograd.grad(y, inputs, t["dy"], create_graph=True)
        total = sum(first.square().mean() for first in firsts)
        found.append(torch.autograd.grad(total, inputs))
    for got, want in zip(*found, strict=True):
        assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


# Transforms


def plain(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(x, weight) + S * x @ A.T @ B.T


def ours(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return lora_linear(x, weight, None, A, B, S)


def loss_of(op: Any) -> Any:
    return lambda x, weight, A, B: op(x, weight, A, B).square().sum()


TRANSFORMS = {
    "grad": lambda op: grad(loss_of(op), argnums=(0, 2, 3)),
    "of each sample": lambda op: vmap(grad(loss_of(op), argnums=2), (0, None, None, None)),
    "ensemble": lambda op: (
        lambda x, w, A, B: vmap(op, (None, None, 0, 0))(
            x, w, torch.stack([A, -A]), torch.stack([B, 2 * B])
        )
    ),
    "jvp": lambda op: lambda *t: jvp(op, t, tuple(tensor.cos() for tensor in t))[1],
    "hessian": lambda op: hessian(loss_of(op), argnums=3),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(transform: str) -> None:
    t = draw(AWKWARD["rank 8"], torch.float64)
    small = [t["x"][:3, :5], t["weight"][:4, :5], t["A"][:2, :5], t["B"][:4, :2]]
    for of in (small, [tensor.detach().requires_grad_() for tensor in small]):
        got, want = (TRANSFORMS[transform](function)(*of) for function in (ours, plain))
        assert_close(got, want)


def test_forward_mode() -> None:
    t = draw(AWKWARD["rank 8"], torch.float64)
    x, weight, A, B = (t[name] for name in ("x", "weight", "A", "B"))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.cos())
        for of in (B, B.detach().requires_grad_()):
            tangents = (forward_ad.unpack_dual(f(dual, weight, A, of))[1] for f in (ours, plain))
            assert_close(*tangents)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_op() -> None:
    t = draw(AWKWARD["rank 8"])
    x, weight, A, B = (t[name] for name in ("x", "weight", "A", "B"))
    traced = torch.jit.trace(ours, (x, weight, A.requires_grad_(), B))
    assert_close(traced(2 * x, weight, A, B), ours(2 * x, weight, A, B))


def test_what_transforms_do_not_serve() -> None:
    t = draw(AWKWARD["rank 8"], torch.float64)
    x, weight, A, B = (t[name] for name in ("x", "weight", "A", "B"))

    def with_sink(x: Tensor) -> Tensor:
        return lora_linear(x, weight, None, A, B, S, sqnorm_sink=sink()).sum()

    def with_dropout(x: Tensor) -> Tensor:
        seed = torch.randint(9, (), device=x.device)
        return lora_linear(x, weight, None, A, B, S, dropout=0.5, seed=seed)

    with pytest.raises(RuntimeError, match=r"statistics cannot be collected under torch\.func"):
        grad(with_sink)(x)
    with pytest.raises(RuntimeError, match="randomness='same'"):
        vmap(with_dropout, randomness="different")(x)
    assert vmap(with_dropout, randomness="same")(x).shape == (len(x), len(B))


@pytest.mark.parametrize("backend", ["eager", "nonsense"])
def test_a_backend_that_is_named_serves_or_says_why_not(backend: str) -> None:
    x, w, A, B = (OPERANDS[name] for name in ("x", "weight", "A", "B"))

    def op(row: Tensor, backend: str | None = None) -> Tensor:
        y = lora_linear(row, w, None, A, B, 1.0, backend=backend)
        assert isinstance(y, Tensor)
        return y

    with pytest.raises(ValueError, match=rf"backend='{backend}': under torch.func"):
        vmap(partial(op, backend=backend))(x)
    assert torch.equal(vmap(partial(op, backend="reference"))(x), vmap(op)(x))


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(AWKWARD["rank 8"], torch.float32), (EIGHTHS["eighths, rank 8"], HALF)],
    ids=["odd", "eighths"],
)
def test_a_recomputed_forward_is_the_same(
    size: Shape, dtype: torch.dtype, p: float, reentrant: bool, backend: str
) -> None:
    """Activation checkpointing restores the generator, and with it the seed and the mask.

    The sinks count the pass once.
    """
    t = draw(size, dtype)
    weights = (torch.arange(size.m, device=DEVICE) % 3).float()

    def layer(x: Tensor, A: Tensor, B: Tensor, *leaves: Tensor) -> Tensor:
        seed = torch.randint(0, 1 << 62, (), device=DEVICE)
        given = {"token_weights": weights, **dict(zip(SINKS, leaves, strict=True))}
        return op(t | {"x": x, "A": A, "B": B}, backend, p, seed=seed, **given)

    outcomes = []
    for recompute in (False, True):
        inputs = leaves({name: tensor.detach().clone() for name, tensor in t.items()})
        inputs += all_sinks(size.k, size.r)
        torch.manual_seed(5)
        y = checkpoint(layer, *inputs, use_reentrant=reentrant) if recompute else layer(*inputs)
        y.backward(t["dy"])
        outcomes.append([y.detach(), *(leaf.grad for leaf in inputs)])
    assert_close(*outcomes, **SAME_BITS)
    assert all(value.any() for value in outcomes[0])


def test_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    through_op(draw(AWKWARD["rank 8"]), None, 0.25)
    assert torch.equal(torch.get_rng_state(), before)


@each_backend
def test_inference_mode(backend: str) -> None:
    t = draw(AWKWARD["rank 8"])
    y, *_, norm = through_op(t, backend, 0.0)
    with torch.inference_mode():
        assert_close(op(t, backend, return_sqnorm=True), (y, norm), **SAME_BITS)


# Refusals


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


OPERANDS = {
    **{"x": ones(5, 8), "weight": ones(6, 8), "bias": ones(6)},
    **{"A": ones(3, 8), "B": ones(6, 3)},
}
OPTIONS = {
    "seed": SEED,
    "token_weights": ones(5),
    "sqnorm_sink": ones(dtype=torch.float64),
    "moment_sink": ones(8, dtype=torch.float64),
    "gram_in_sink": ones(3, 3, dtype=torch.float64),
    "core_sink": ones(3, 3, dtype=torch.float64),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "x of another K": ({"x": ones(5, 9)}, r"x .*\(5, 9\).*A .*\(3, 8\)"),
    "x without axes": ({"x": ones()}, r"x .*\(\)"),
    "weight transposed": ({"weight": ones(8, 6)}, r"weight.*\(8, 6\).*\(6, 8\)"),
    "weight 1-D": ({"weight": ones(8)}, r"weight.*\(8,\)"),
    "bias of another N": ({"bias": ones(7)}, r"bias.*\(7,\)"),
    "bias 2-D": ({"bias": ones(1, 6)}, r"bias.*\(1, 6\)"),
    "A of another K": ({"A": ones(3, 9)}, r"\(3, 9\)"),
    "A and B of other ranks": ({"B": ones(6, 4)}, r"A .*\(3, 8\).*B .*\(6, 4\)"),
    "B of another N": ({"B": ones(7, 3)}, r"weight.*\(6, 8\).*B \(7, 3\)"),
    "A 1-D": ({"A": ones(8)}, r"A .*\(8,\)"),
    "rank 0": ({"A": ones(0, 8), "B": ones(6, 0)}, r"A .*\(0, 8\)"),
    "x of integers": ({"x": ones(5, 8, dtype=torch.int64)}, "int64"),
    "x complex": ({"x": ones(5, 8, dtype=torch.complex64)}, "complex64"),
    "weight of another dtype": ({"weight": ones(6, 8, dtype=torch.bfloat16)}, "weight.*bfloat16"),
    "bias of another dtype": ({"bias": ones(6, dtype=torch.float64)}, "bias.*float64"),
    "A of integers": ({"A": ones(3, 8, dtype=torch.int32)}, "A .*int32"),
    "B complex": ({"B": ones(6, 3, dtype=torch.complex64)}, "B .*complex64"),
    "dropout 1": ({"dropout": 1.0}, "dropout=1"),
    "dropout negative": ({"dropout": -0.1}, "dropout=-0.1"),
    "dropout NaN": ({"dropout": math.nan}, "dropout=nan"),
    "dropout without seed": ({"dropout": 0.5, "seed": None}, "seed"),
    "seed a vector": ({"dropout": 0.5, "seed": torch.tensor([1, 2], device=DEVICE)}, "seed"),
    "seed a float": ({"dropout": 0.5, "seed": torch.tensor(1.0, device=DEVICE)}, "seed"),
    "weights of other rows": ({"token_weights": ones(4)}, r"token_weights.*\(4,\).*\(5,\)"),
    "weights with the last axis": ({"token_weights": ones(5, 1)}, r"token_weights.*\(5, 1\)"),
    "weights complex": ({"token_weights": ones(5, dtype=torch.complex64)}, "weights.*complex64"),
    "sqnorm_sink of float32": ({"sqnorm_sink": ones()}, "sqnorm_sink.*float32"),
    "sqnorm_sink a vector": ({"sqnorm_sink": ones(1, dtype=torch.float64)}, r"sqnorm_sink.*\(1,\)"),
    "moment_sink of float32": ({"moment_sink": ones(8)}, "moment_sink.*float32"),
    "moment_sink of another K": (
        {"moment_sink": ones(9, dtype=torch.float64)}, r"moment_sink.*\(8,\).*\(9,\)"
    ),
    "gram_in_sink of another r": (
        {"gram_in_sink": ones(4, 4, dtype=torch.float64)}, r"gram_in_sink.*\(3, 3\).*\(4, 4\)"
    ),
    "core_sink of float32": ({"core_sink": ones(3, 3)}, "core_sink.*float32"),
}  # fmt: skip
ELSEWHERE = {
    f"{name} elsewhere": ({name: tensor.to("meta"), "dropout": 0.5}, rf"\b{name}\b.*meta")
    for name, tensor in (OPERANDS | OPTIONS).items()
    if name != "x"  # where it is, is where the others belong
}


@pytest.mark.parametrize(
    ("change", "message"), (REFUSED | ELSEWHERE).values(), ids=REFUSED | ELSEWHERE
)
def test_refusals_name_what_is_wrong(change: dict[str, Any], message: str) -> None:
    arguments = OPERANDS | {"scaling": 1.0, "seed": SEED, "return_sqnorm": True} | change
    with pytest.raises((ValueError, TypeError), match=message):
        lora_linear(**arguments)


@pytest.mark.parametrize(
    ("y0", "message"),
    [(ones(5, 7), r"y0.*\(5, 7\)"), (ones(6), "y0"), (ones(5, 6, dtype=torch.float64), "float64")],
    ids=["other N", "no rows", "other dtype"],
)
def test_lora_add_refuses_a_y0_that_does_not_fit(y0: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        lora_add(y0, ones(5, 8), ones(3, 8), ones(6, 3), 1.0)


def test_shapes_pass_through_a_meta_device() -> None:
    on_meta = {name: tensor.to("meta") for name, tensor in OPERANDS.items()}
    y = lora_linear(**on_meta, scaling=1.0)
    assert (y.shape, y.device.type) == ((5, 6), "meta")
