"""Which backend serves, and why another does not."""

import inspect
import itertools
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import DEVICE, S, draw, each_dtype, through_op

from loradrop.op import costs, dispatch
from loradrop.op.costs import Problem
from loradrop.op.function import _aligned, problem_of
from loradrop.op.linear import lora_add, lora_linear
from loradrop.testing import AWKWARD

H200 = {"arch": 90, "sms": 132}
LLAMA_Q = Problem("cuda", torch.bfloat16, 8192, 4096, 4096, 16, 0.0, **H200)


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


def test_signatures_of_the_kernels_too() -> None:
    pytest.importorskip("triton")
    from loradrop.op import fused

    for part in ("forward", "backward"):
        want = inspect.signature(getattr(dispatch.get("reference"), part)).parameters
        for backend in (fused.THIN, fused.TRITON):
            assert list(inspect.signature(getattr(backend, part)).parameters) == list(want)


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
    with pytest.raises(ValueError, match=r"no_such.*reference.*eager.*thin.*triton.*cuda"):
        lora_linear(t["x"], t["weight"], None, t["A"], t["B"], S, backend="no_such")


@pytest.mark.skipif(DEVICE == "cuda", reason="the choice depends on the device's facts")
@each_dtype
def test_an_unnamed_backend_is_one_of_the_named(dtype: torch.dtype) -> None:
    t = draw(AWKWARD["rank 8"], dtype)
    problem = Problem("cpu", dtype, 37, 100, 65, 8, 0.0)
    named = through_op(t, dispatch.choose(problem), 0.0)
    for one, two in zip(through_op(t, None, 0.0), named, strict=True):
        assert torch.equal(one, two)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"dtype": torch.float64}, "float64"),
    "wide rank": ({"r": 257}, "256, not 257"),
    "old device": ({"arch": 75}, r"8\.0 is needed, not 7\.5"),
    "another device": ({"device": "xpu"}, "not xpu"),
    "a CPU": ({"device": "cpu"}, "TRITON_INTERPRET"),
}


@pytest.mark.parametrize(("change", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_the_kernels_do_not_support(change: dict[str, Any], words: str) -> None:
    for name in ("thin", "triton"):
        supports = dispatch.get(name).supports
        assert supports(LLAMA_Q) is None
        reason = supports(LLAMA_Q._replace(**change))
        assert reason is not None and re.search(words, reason), reason


@pytest.fixture
def as_if_kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_triton_available", lambda: None)
    monkeypatch.setattr(dispatch, "_able", lambda _: ("reference", "eager", "thin", "triton"))
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


@pytest.mark.usefixtures("as_if_kernels_run")
def test_a_fallback_says_its_reason_once() -> None:
    dispatch._say_once.cache_clear()
    wide = LLAMA_Q._replace(r=300)
    with pytest.warns(UserWarning, match="plain PyTorch calls: .*256, not 300"):
        assert dispatch.choose(wide) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(wide._replace(m=4096)) == "eager"


@pytest.mark.usefixtures("as_if_kernels_run")
def test_measurements_outrank_the_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    point = {
        **{"arch": 90, "sms": 132, "dtype": "bfloat16", "m": 8192, "k": 4096, "n": 4096},
        **{"r": 16, "dropout": 0, "grad": 1},
    }

    def chosen(us: dict[str, float], problem: Problem = LLAMA_Q) -> str:
        monkeypatch.setattr(costs, "measurements", lambda: (point | {"us": us},))
        dispatch.choose.cache_clear()
        return dispatch.choose(problem)

    assert chosen({"eager": 900.0, "thin": 800.0, "triton": 700.0}) == "triton"
    assert chosen({"eager": 700.0, "thin": 800.0, "triton": 900.0}) == "eager"
    assert chosen({"eager": 700.0, "triton": 690.0}) == "eager", "less than 2 % is no reason"
    assert chosen({"eager": 700.0, "cuda": 1.0}) == "eager", "not built here"
    slow = {"eager": 1.0, "thin": 2.0, "triton": 3.0}
    assert chosen(slow, LLAMA_Q._replace(m=6000)) == "eager", "near enough"
    predicted = costs.choose_predicted(LLAMA_Q._replace(m=1024))
    assert chosen(slow, LLAMA_Q._replace(m=1024)) == predicted, "too far away"
    for change in ({"k": 8192}, {"r": 64}, {"dropout": 0.1}, {"grad": False}, {"arch": 80}):
        other = LLAMA_Q._replace(**change)
        assert costs.choose_measured(other) is None
        assert chosen(slow, other) == costs.choose_predicted(other)


def test_no_gpu_is_an_error() -> None:
    """Whatever the device, size or rank, the roofline has an answer."""
    chips = itertools.product((80, 86, 90, 103, 121), (1, 40, 132))
    sizes = itertools.product((1, 37, 8192), (1, 256), (0.0, 0.1), (False, True))
    for (arch, sms), (m, r, p, grad) in itertools.product(chips, sizes):
        problem = LLAMA_Q._replace(arch=arch, sms=sms, m=m, r=r, dropout=p, grad=grad)
        times = {name: costs.predict(problem, name) for name in ("eager", "thin", "triton")}
        assert all(0 < us < 1e7 for us in times.values())
        assert costs.choose_predicted(problem) in times


def test_the_roofline_is_near_what_is_known_of_an_h200() -> None:
    """performance figures: the frozen product of 8192 x 4096 x 4096 takes about 348 µs."""
    bare = LLAMA_Q._replace(grad=False)
    rate = costs.rates(90, 132)
    assert 2 * 8192 * 4096**2 / rate.flops == pytest.approx(348e-6, rel=0.03)
    assert rate.bytes == pytest.approx(4.3e12, rel=0.03)
    assert 1.08 < costs.predict(bare, "eager") / 348 < 1.2
    # Dropout by PyTorch calls costs many passes over x: the kernels take it.
    assert costs.choose_predicted(LLAMA_Q._replace(dropout=0.1)) != "eager"


def test_the_roofline_counts_launches_and_never_guesses_a_gemm() -> None:
    """A mask by PyTorch calls takes hundreds of launches; a guess keeps cuBLAS."""
    for m in (1, 32, 256, 8192):
        masked = LLAMA_Q._replace(m=m, dropout=0.1)
        assert costs.predict(masked, "eager") > 2 * costs.predict(masked, "thin")
        assert costs.choose_predicted(masked) == "thin"
        assert costs.choose_predicted(LLAMA_Q._replace(m=m)) != "triton"
    given = LLAMA_Q._replace(base=False)
    thin, triton = (costs.predict(given, name) for name in ("thin", "triton"))
    assert thin == pytest.approx(triton, rel=0.1), "both add to y0 by the same kernel"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"aligned": False}, "16 bytes"),
        ({"arch": 80}, r"9\.0 is needed, not 8\.0"),
        ({"n": 1001}, "multiples of 8, not 1001"),
        ({"dtype": torch.float32}, "float32"),
        ({"r": 300}, "256, not 300"),
    ],
)
def test_what_the_cuda_kernels_do_not_support(change: dict[str, Any], words: str) -> None:
    supports = dispatch.get("cuda").supports
    assert supports(LLAMA_Q) is None
    assert re.search(words, str(supports(LLAMA_Q._replace(**change))))


def test_alignment_is_seen_in_strides() -> None:
    x, weight = torch.zeros(8, 64).bfloat16(), torch.zeros(32, 64).bfloat16()
    A, B = torch.zeros(4, 64), torch.zeros(32, 4)
    for device_sees, case in ((True, x), (False, x[:, 1:33]), (True, x[:, :32])):
        assert _aligned(case) is device_sees
    assert _aligned(weight.T) and not _aligned(weight[:, ::2])
    assert problem_of(x, weight, A, B, 0.0).aligned


def test_an_explanation_is_what_is_chosen() -> None:
    for change in ({}, {"r": 300}, {"dtype": torch.float64}, {"arch": 75}, {"dropout": 0.1}):
        name, _, why = dispatch.explain(LLAMA_Q._replace(**change)).partition(": ")
        assert name in ("reference", "eager", "thin") and why
    assert dispatch.explain(LLAMA_Q._replace(r=300)).startswith("eager: the kernels hold ranks")


def test_a_choice_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not measured; the roofline's guess" in costs.explain(LLAMA_Q)
    point = {
        **{"arch": 90, "sms": 132, "dtype": "bfloat16", "m": 8000, "k": 4096, "n": 4096},
        **{"r": 16, "dropout": 0, "grad": 1, "us": {"eager": 812.4, "triton": 700.1}},
    }
    monkeypatch.setattr(costs, "measurements", lambda: (point,))
    said = costs.explain(LLAMA_Q)
    assert said == "triton: measured at 8000 tokens, in µs: eager 812, triton 700"


def test_the_shipped_measurements_are_well_formed() -> None:
    for point in costs.measurements():
        assert set(point) == {"arch", "sms", "dtype", "m", "k", "n", "r", "dropout", "grad", "us"}
        assert set(point["us"]) <= set(costs.SERVING)
