"""Which backend serves, and why another does not."""

import dataclasses
import inspect
import itertools
import re
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
import torch
from op_cases import (
    DEVICE,
    EIGHTHS,
    OF_CUDA,
    SAME_BITS,
    call_of,
    draw,
    each_dtype,
    must_refuse,
    op,
    strided,
    through_op,
)
from torch.testing import assert_close

import loradrop
from loradrop.kernels.tiles import Machine, as_stored, rows_aligned
from loradrop.op import call as call_module
from loradrop.op import costs, dispatch
from loradrop.op.call import Problem, problem_of
from loradrop.op.linear import lora_add, lora_linear
from loradrop.op.points import KERNELS, SERVING
from loradrop.op.warn import warn_once
from loradrop.testing import AWKWARD, Shape

H200 = {"arch": 90, "sms": 132}
LLAMA_Q = Problem("cuda", torch.bfloat16, 8192, 4096, 4096, 16, 0.0, **H200)
MEASURED = {  # of LLAMA_Q
    **{**H200, "dtype": "bfloat16", "m": 8192, "k": 4096, "n": 4096},
    **{"r": 16, "dropout": 0, "grad": 1, "us": {"eager": 1.0}},
}


def test_both_entries_take_the_same_options() -> None:
    one, two = ([*inspect.signature(f).parameters.values()] for f in (lora_linear, lora_add))
    assert [p.name for p in one[:6]] == ["x", "weight", "bias", "A", "B", "scaling"]
    assert [p.name for p in two[:5]] == ["y0", "x", "A", "B", "scaling"]
    assert one[6:] == two[5:] and all(p.kind is p.KEYWORD_ONLY for p in one[6:])


@pytest.mark.skipif(DEVICE == "cuda", reason="there it can")
@pytest.mark.parametrize("name", KERNELS)
def test_a_backend_that_cannot_serve_says_why(name: str) -> None:
    t = draw(AWKWARD["rank 4"])
    backend = dispatch.named(name)
    reason = backend.refuses(call_of(t))
    assert reason == (backend.missing() or backend.why_not(problem_of(call_of(t))))
    assert reason, "on the CPU there is a reason"
    with pytest.raises(dispatch.RefusedError) as raised:
        op(t, name)
    assert name in str(raised.value) and reason in str(raised.value)
    expected = Problem("cpu", torch.float32, 37, 31, 17, 4, 0.0, grad=False)
    assert raised.value.problem._replace(sms=0) == expected


@pytest.mark.parametrize("grad", [False, True])
def test_a_call_is_refused_or_asked_about_once(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named call asks its backend once; an unnamed one on a CPU asks nobody."""
    asked: list[Problem] = []

    def why_not(problem: Problem) -> str | None:
        asked.append(problem._replace(sms=0))
        return None

    other = dataclasses.replace(dispatch.BACKENDS["eager"], name="other", why_not=why_not)
    monkeypatch.setitem(dispatch.BACKENDS, "other", other)
    t = draw(AWKWARD["rank 4"])
    t["A"].requires_grad_(grad)
    y = op(t, "other", 0.25)
    if grad:
        y.sum().backward()
    assert asked == [Problem("cpu", torch.float32, 37, 31, 17, 4, 0.25)]
    monkeypatch.setattr(dispatch, "choose", None)
    monkeypatch.setattr(dispatch, "problem_of", None)
    assert dispatch.serving(call_of(t), None).name == "eager"
    t = draw(AWKWARD["rank 4"], torch.float64)
    assert dispatch.serving(call_of(t), None).name == "reference"


def test_an_unknown_backend_lists_the_known() -> None:
    t = draw(AWKWARD["rank 4"])
    with pytest.raises(ValueError, match=r"no_such.*reference.*eager.*thin.*triton.*cuda"):
        op(t, "no_such")


@pytest.mark.skipif(DEVICE == "cuda", reason="the choice depends on the device's facts")
@each_dtype
def test_an_unnamed_backend_is_one_of_the_named(dtype: torch.dtype) -> None:
    t = draw(AWKWARD["rank 8"], dtype)
    problem = Problem("cpu", dtype, 37, 100, 65, 8, 0.0)
    named = through_op(t, dispatch.choose(problem), 0.0)
    assert_close(through_op(t, None, 0.0), named, **SAME_BITS)


BY_TRITON, BY_CUDA = ("thin", "triton"), ("cuda",)
REFUSALS: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "float64": (BY_TRITON, {"dtype": torch.float64}, "float64"),
    "float32": (BY_CUDA, {"dtype": torch.float32}, "float32"),
    "wide rank": (BY_TRITON + BY_CUDA, {"r": 257}, "256, not 257"),
    "odd N": (BY_CUDA, {"n": 1001}, "multiples of 8, not 1001"),
    "odd rows": (BY_CUDA, {"aligned": False}, "16 bytes"),
    "old device": (BY_TRITON, {"arch": 75}, r"8\.0 is needed, not 7\.5"),
    "older than Hopper": (BY_CUDA, {"arch": 80}, r"9\.0 is needed, not 8\.0"),
    "another device": (BY_TRITON, {"device": "xpu"}, "not xpu"),
    "a CPU": (BY_TRITON, {"device": "cpu"}, "TRITON_INTERPRET"),
}


@pytest.mark.parametrize(("names", "change", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_the_kernels_do_not_support(
    names: tuple[str, ...], change: dict[str, Any], words: str
) -> None:
    for name in names:
        why_not = dispatch.named(name).why_not
        assert why_not(LLAMA_Q) is None
        reason = why_not(LLAMA_Q._replace(**change))
        assert reason is not None and re.search(words, reason), reason


@pytest.fixture
def as_if_kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "triton_missing", lambda: None)
    for name in ("thin", "triton"):
        runs = dataclasses.replace(dispatch.BACKENDS[name], missing=lambda: None)
        monkeypatch.setitem(dispatch.BACKENDS, name, runs)
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


@pytest.mark.usefixtures("as_if_kernels_run")
def test_a_fallback_says_its_reason_once() -> None:
    warn_once.cache_clear()
    wide = LLAMA_Q._replace(r=300)
    with pytest.warns(UserWarning, match="plain PyTorch calls: .*256, not 300"):
        assert dispatch.choose(wide) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(wide._replace(m=4096)) == "eager"


@pytest.mark.usefixtures("as_if_kernels_run")
def test_measurements_outrank_the_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(us: dict[str, float], problem: Problem = LLAMA_Q) -> str:
        monkeypatch.setattr(costs, "measurements", lambda: (MEASURED | {"us": us},))
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


def test_the_cuda_kernels_refuse_what_they_must_and_nothing_else() -> None:
    """The suite skips what `must_refuse` names, so it must be what the backend refuses."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    sizes = itertools.product((1, 37, 8192), (4096, 1000, 31), (4096, 17), (1, 64, 256, 257))
    for dtype, arch, aligned, (m, k, n, r) in itertools.product(
        dtypes, (80, 90, 100), (True, False), list(sizes)
    ):
        problem = Problem("cuda", dtype, m, k, n, r, 0.0, arch=arch, sms=132, aligned=aligned)
        for name in OF_CUDA:
            assert (dispatch.named(name).why_not(problem) is not None) == must_refuse(problem)
    for (m, k, n, r), dtype in itertools.product(EIGHTHS.values(), dtypes[2:]):
        assert not must_refuse(Problem("cuda", dtype, m, k, n, r, 0.25, arch=90, sms=132))


@pytest.mark.parametrize("name", OF_CUDA)
def test_the_suite_skips_their_refusals_alone(name: str) -> None:
    def end(problem: Problem, backend: str = name) -> None:
        """How a test of that backend ends where the op refuses the problem."""
        item = SimpleNamespace(callspec=SimpleNamespace(params={"backend": backend}))
        running = conftest.pytest_runtest_call(item)
        next(running)
        running.throw(dispatch.RefusedError(backend, "sizes", problem))

    with pytest.raises(pytest.skip.Exception, match=f"backend='{name}' cannot serve .*: sizes"):
        end(LLAMA_Q._replace(n=4097))
    for problem, backend in ((LLAMA_Q, name), (LLAMA_Q._replace(n=4097), "triton")):
        with pytest.raises(dispatch.RefusedError):
            end(problem, backend)


def test_alignment_is_seen_in_strides() -> None:
    x, weight = torch.zeros(8, 64).bfloat16(), torch.zeros(32, 64).bfloat16()
    assert rows_aligned(x) and rows_aligned(x[:, :31]) and rows_aligned(x[1:, 8:])
    assert not rows_aligned(x[:, 1:33]), "begins in between"
    assert not rows_aligned(torch.zeros(8, 65).bfloat16()[:, :64]), "rows of 130 bytes"
    assert not rows_aligned(x[:1].expand(8, -1)), "rows in one place"
    assert not rows_aligned(weight.T) and rows_aligned(as_stored(weight.T))
    assert not rows_aligned(as_stored(weight[:, ::2]))


@pytest.mark.parametrize("which", ["x", "weight"])
def test_alignment_of_a_call(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_module, "machine_of", lambda _: Machine(90, 132))
    t = draw(Shape(8, 64, 32, 4), torch.bfloat16)
    assert problem_of(call_of(t)).aligned and (problem_of(call_of(t)).arch == 90)
    assert problem_of(call_of(t | {which: t[which].T.contiguous().T})).aligned
    odd = strided(t[which], "offset")
    assert not problem_of(call_of(t | {which: odd})).aligned
    added = problem_of(call_of({**t, "weight": None, "y0": t["dy"]}))  # type: ignore[dict-item]
    assert added.aligned and not added.base
    monkeypatch.undo()
    assert problem_of(call_of(t | {which: odd})).aligned, "a CPU does not care"


def test_an_explanation_is_what_is_chosen() -> None:
    for change in ({}, {"r": 300}, {"dtype": torch.float64}, {"arch": 75}, {"dropout": 0.1}):
        name, _, why = dispatch.explain(LLAMA_Q._replace(**change)).partition(": ")
        assert name in dispatch.BACKENDS and why
    assert dispatch.explain(LLAMA_Q._replace(r=300)).startswith("eager: the kernels hold ranks")


def test_a_choice_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "measurements", lambda: ())
    assert "not measured; the roofline's guess" in costs.explain(LLAMA_Q)
    point = MEASURED | {"m": 8000, "us": {"eager": 812.4, "triton": 700.1}}
    monkeypatch.setattr(costs, "measurements", lambda: (point,))
    times = "at 8000 tokens, in µs: eager 812, triton 700"
    assert costs.explain(LLAMA_Q) == f"triton: measured {times}"
    point["device"] = "NVIDIA H200"
    assert costs.explain(LLAMA_Q) == f"triton: measured on NVIDIA H200 {times}"


def test_a_measurement_holds_for_its_own_device() -> None:
    """H100 and H200 are both sm_90 with 132 multiprocessors."""
    h100, h200, pcie = (
        MEASURED | {"device": name, "sms": sms, "m": m}
        for name, sms, m in (("H100", 132, 8192), ("H200", 132, 7000), ("H100", 114, 8192))
    )
    on = {name: LLAMA_Q._replace(device_name=name) for name in ("H100", "H200", "")}
    for points in ((h100, h200, pcie), (pcie, h200, h100)):
        assert costs.nearest(on["H100"], points) is h100
        assert costs.nearest(on["H200"], points) is h200, "before one with as many tokens"
        assert costs.nearest(on[""], points) is h100
        assert costs.nearest(on["H100"]._replace(sms=114), points) is pcie
    assert costs.nearest(on["H100"], [h200]) is None
    assert costs.nearest(on[""], [h200]) is h200
    assert costs.nearest(on["H100"], [MEASURED]) is MEASURED
    assert costs.nearest(on["H100"], [MEASURED, pcie]) is pcie, "the name before the size"


@pytest.mark.parametrize(
    ("measured", "asked", "holds"),
    [(8192, 2048, True), (2048, 65536, True), (8192, 2047, False), (2047, 8192, False),
     (1024, 1500, True), (1024, 1600, False), (1, 2, False)],
)  # fmt: skip
def test_of_how_many_tokens_a_measurement_speaks(measured: int, asked: int, holds: bool) -> None:
    point = MEASURED | {"m": measured}
    found = costs.nearest(LLAMA_Q._replace(m=asked), [point])
    assert (found is point) == holds
    near = MEASURED | {"m": asked}
    assert costs.nearest(LLAMA_Q._replace(m=asked), [point, near]) is near


def test_the_shipped_measurements_are_well_formed() -> None:
    for point in costs.measurements():
        assert set(point) == {"device", *MEASURED}
        assert set(point["us"]) <= set(SERVING)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_warning_names_the_line_that_led_to_it(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one of this package, however many of its frames and of PyTorch's lie between."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules=["0"]))

    def warns(*_: object) -> str:
        warn_once("something to say")
        return "eager"

    monkeypatch.setattr(dispatch, "_trusts_cpu", lambda: False)
    monkeypatch.setattr(dispatch, "choose", warns)
    warn_once.cache_clear()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        pytest.warns(UserWarning, match="something to say") as said,
    ):
        model(torch.ones(2, 8))
    assert [one.filename for one in said] == [__file__]


@pytest.mark.usefixtures("as_if_kernels_run")
def test_a_device_that_was_never_measured_is_told_of_once() -> None:
    warn_once.cache_clear()
    problem = LLAMA_Q._replace(device_name="NVIDIA H200")
    with pytest.warns(UserWarning, match="NVIDIA H200: some of these layers .*loradrop tune MODEL"):
        dispatch.choose(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.choose(problem._replace(m=4096))
        warn_once.cache_clear()
        for change in ({"base": False}, {"m": 0}):  # what nobody can measure
            dispatch.choose(problem._replace(**change))
