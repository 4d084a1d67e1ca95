"""Which backend serves, and why another does not."""

import inspect

import pytest
import torch
from op_cases import DEVICE, S, draw, each_dtype, through_op

from loradrop import dispatch
from loradrop.costs import Problem
from loradrop.ops import lora_add, lora_linear
from loradrop.testing import AWKWARD


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_signatures_are_identical(part: str) -> None:
    signatures = {
        b.name: [
            (p.name, p.kind, p.default)
            for p in inspect.signature(getattr(b, part)).parameters.values()
        ]
        for b in dispatch.backends()
        if b.available() is None
    }
    assert {"reference", "eager"} <= set(signatures)
    assert all(signature == signatures["reference"] for signature in signatures.values())


def test_both_entries_take_the_same_options() -> None:
    one, two = (inspect.signature(f).parameters for f in (lora_linear, lora_add))
    keyword = [
        [(p.name, p.default) for p in s.values() if p.kind is p.KEYWORD_ONLY] for s in (one, two)
    ]
    assert keyword[0] == keyword[1]
    assert list(one)[:6] == ["x", "weight", "bias", "A", "B", "scaling"]
    assert list(two)[:5] == ["y0", "x", "A", "B", "scaling"]


@pytest.mark.skipif(DEVICE == "cuda", reason="there it can")
@pytest.mark.parametrize("name", ["thin", "triton", "cuda"])
def test_a_backend_that_cannot_serve_says_why(name: str) -> None:
    t = draw(AWKWARD["rank 4"])
    reason = dispatch.get(name).available() or dispatch.get(name).supports(
        Problem("cpu", torch.float32, 37, 31, 17, 4, 0.0)
    )
    assert reason, "on the CPU there is a reason"
    with pytest.raises(RuntimeError) as raised:
        lora_linear(t["x"], t["weight"], None, t["A"], t["B"], S, backend=name)
    assert name in str(raised.value) and reason in str(raised.value)


def test_an_unknown_backend_lists_the_known() -> None:
    t = draw(AWKWARD["rank 4"])
    with pytest.raises(ValueError, match=r"no_such.*reference.*eager.*triton.*cuda"):
        lora_linear(t["x"], t["weight"], None, t["A"], t["B"], S, backend="no_such")


@each_dtype
def test_an_unnamed_backend_is_one_of_the_named(dtype: torch.dtype) -> None:
    t = draw(AWKWARD["rank 8"], dtype)
    problem = Problem(DEVICE, dtype, 37, 100, 65, 8, 0.0)
    named = through_op(t, dispatch.choose(problem), 0.0)
    for one, two in zip(through_op(t, None, 0.0), named, strict=True):
        assert torch.equal(one, two)
