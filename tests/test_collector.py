"""Online scores are the offline ones, however training runs, and change nothing in it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import net
from probe_cases import (
    EXACT,
    RANKS,
    Batch,
    batches,
    collecting,
    in_two_parts,
    online,
    probed,
    step,
)
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torchrun import in_ranks, leave

import loradrop
from loradrop.scores import Scores
from loradrop.statistics.collector import Collector
from loradrop.statistics.masks import EVERY_TOKEN, MASKED

pytestmark = pytest.mark.numbers


def two_passes(model: Any, one: Batch, two: Batch, **options: Any) -> Scores:
    """Of one backward, as contrastive losses have."""
    with collecting(model, **options) as collector:
        (step(model, one) + step(model, two)).backward()
        collector.close_row()
        return collector.scores()


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_online_equals_offline(reentrant: bool | None, accumulate: int) -> None:
    model, data = net(reentrant), batches()
    offline = loradrop.probe(model, data)
    scores = online(model, data, accumulate=accumulate)
    assert scores.source == "online" and scores.tokens == offline.tokens
    expected = offline.rows.view(-1, accumulate, 4).sum(1)
    assert scores.rows.shape == expected.shape and expected.min() > 0
    torch.testing.assert_close(scores.rows, expected, **EXACT)


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "model.compile"])
def test_online_equals_offline_when_compiled(in_place: bool) -> None:
    model, data = net(), batches(2)
    offline = loradrop.probe(model, data)
    torch.compiler.reset()
    if in_place:
        model.compile(backend="aot_eager")
    fast = None if in_place else torch.compile(model, backend="aot_eager")
    scores = online(model, data, fast)
    torch.testing.assert_close(scores.rows, offline.rows, rtol=1e-6, atol=0)
    assert scores.tokens == offline.tokens


def test_online_equals_offline_under_autocast() -> None:
    model, data = net(), batches()
    plain = probed(model, data)
    narrow = torch.autocast("cpu", torch.bfloat16)
    offline = narrow(loradrop.probe)(model, data)
    scores = online(model, data, narrow(model.__call__))
    torch.testing.assert_close(scores.rows, offline.rows, **EXACT)
    assert dict(scores) == pytest.approx(plain, rel=0.02) and dict(scores) != plain


def test_evaluation_between_steps_counts_nothing() -> None:
    """Nor is its mask asked for: with a KV cache, it is longer than the tokens."""
    model, data = net(), batches()
    offline = loradrop.probe(model, data)

    def run(**batch: Tensor) -> Tensor:
        with torch.no_grad():
            model(**data[0])
            model(data[0]["input_ids"], torch.ones(2, 99))
        return model(**batch)

    scores = online(model, data, run)
    torch.testing.assert_close(scores.rows, offline.rows, **EXACT)
    assert scores.tokens == offline.tokens


@pytest.mark.parametrize("reentrant", [True, False])
def test_evaluation_before_a_backward_leaves_its_mask_alone(reentrant: bool) -> None:
    model, batch = net(reentrant), batches(1)[0]
    expected = loradrop.probe(model, [batch]).rows
    with collecting(model) as collector:
        loss = step(model, batch)
        with torch.no_grad():
            model(batch["input_ids"], torch.ones_like(batch["attention_mask"]))
        loss.backward()
        collector.close_row()
    torch.testing.assert_close(collector.scores().rows, expected, **EXACT)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_two_passes_of_one_backward(reentrant: bool | None, masked: bool) -> None:
    """Each keeps the mask it came with; where activations are recomputed none is guessed."""
    model, one = net(reentrant), batches(1)[0]
    two = one | {"attention_mask": torch.ones_like(one["attention_mask"])}
    masking = MASKED if masked else EVERY_TOKEN
    expected = loradrop.probe(model, [one, two], mask=masking.mask)
    if masked and reentrant is not None:
        with pytest.raises(RuntimeError, match=r"cannot tell whose 'attention_mask'.*mask=None"):
            two_passes(model, one, two)
        return
    scores = two_passes(model, one, two, masking=masking)
    torch.testing.assert_close(scores.rows[0], expected.rows.sum(0), **EXACT)
    assert scores.tokens == expected.tokens


def test_collecting_changes_no_gradient() -> None:
    model, data = net(lora_dropout=0.3), batches()
    gradients = []
    for collect in (collecting(model), nullcontext()):
        model.zero_grad()
        torch.manual_seed(0)
        with collect:
            sum(step(model, batch) for batch in data).backward()
        gradients.append([p.grad.clone() for p in model.lora_bank.parameters()])
    assert all(one.any() for one in gradients[0]) and all(map(torch.equal, *gradients))
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_collector_goes_on_from_its_state() -> None:
    model, data = net(), batches()
    whole, found = online(model, data), in_two_parts(model, data)
    torch.testing.assert_close(found.rows, whole.rows, **EXACT)
    assert found.tokens == whole.tokens


# Two processes


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    model, mine = net(), batches(4)[rank::RANKS]
    offline = loradrop.probe(model, mine)
    parallel = DistributedDataParallel(model)
    names = ["sqnorm", "moment"]
    collector = Collector(model, model.lora_bank, online=True, statistics=names)
    for batch in mine:
        with parallel.no_sync() if batch is mine[0] else torch.enable_grad():
            step(parallel, batch).backward()
    found = {
        "gradients": [p.grad for p in model.lora_bank.parameters()],
        "moments": collector.close_row()["moment"],
    }
    scores = collector.scores()
    resumed = Collector(model, model.lora_bank, online=True)
    resumed.load_state_dict(collector.state_dict())
    for name, each in (("online", scores), ("offline", offline), ("resumed", resumed.scores())):
        found[name] = dict(each), each.tokens
    torch.save(found, f"{folder}/rank{rank}.pt")
    leave()


def test_scores_are_summed_over_ranks(tmp_path: Path) -> None:
    assert not any(in_ranks(on_rank, str(tmp_path), processes=RANKS))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    model, data = net(), batches(4)
    expected = loradrop.probe(model, data)
    with collecting(model, statistics=["moment"]) as collector:
        sum(step(model, batch) / RANKS for batch in data).backward()
        moments = collector.close_row()["moment"]
    gradients = [p.grad for p in model.lora_bank.parameters()]
    assert all(want.min() > 0 for want in moments)
    for got in ranks:
        for name in ("online", "offline"):
            assert got[name] == (pytest.approx(dict(expected), rel=1e-6), expected.tokens)
        assert got["resumed"] == got["online"]  # each rank's part once
        torch.testing.assert_close(got["moments"], moments, rtol=1e-6, atol=0)
        assert all(map(torch.equal, got["gradients"], ranks[0]["gradients"]))
        torch.testing.assert_close(got["gradients"], gradients, rtol=1e-5, atol=1e-6)


def test_an_unknown_statistic_lists_the_known() -> None:
    model = net()
    with pytest.raises(ValueError, match="statistics has 'median': choose among sqnorm, moment"):
        Collector(model, model.lora_bank, online=True, statistics=["median"])
    assert not model._forward_hooks and model.lora_bank.collector is None
