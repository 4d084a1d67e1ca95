"""Scores are Σ‖s·B·A·x‖² over real tokens, by hooks; online they are the same however it runs."""

import copy
import random
from collections import namedtuple
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import loradrop
from loradrop.collector import Collector
from loradrop.injection import injection_of
from loradrop.scores import Scores

pytestmark = pytest.mark.numbers

WIDTH, R, VOCABULARY = 12, 3, 20
Batch = dict[str, Tensor]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.query(x)) * self.value(x))


class Net(nn.Module):
    """Embedding and two layers; `reentrant` turns on activation checkpointing."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers, self.reentrant = nn.ModuleList([Layer(), Layer()]), reentrant

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        if self.reentrant:
            x = x.detach().requires_grad_()
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def wake(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for B in model.lora_bank.B:
            B.copy_(torch.randn(B.shape, generator=generator))
    return model


def net(reentrant: bool | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Net(reentrant)
    config = loradrop.LoRAConfig(r=R, lora_alpha=4, target_modules=["query", "value"], **options)
    loradrop.inject(model, config)
    return wake(model)


def batches(count: int = 4) -> list[Batch]:
    """Of different sizes, with padding."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for i in range(count):
        ids = torch.randint(0, VOCABULARY, (2 + i % 2, 5 + i), generator=generator)
        lengths = torch.randint(1, 5 + i, (len(ids), 1), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(5 + i) < lengths).long()})
    return made


def by_hooks(model: nn.Module, data: Iterable[Batch], masked: bool = True) -> dict[str, float]:
    """The definition: float64 products of every target's input, by forward hooks."""
    bank, totals, handles = model.lora_bank, {}, []
    current: list[Batch] = []

    def count(i: int, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor], __: Tensor) -> None:
            A, B = (factor.detach().double() for factor in bank.factors(i))
            delta = bank.scaling[i] * args[0].detach().double() @ A.T @ B.T
            per_token = delta.square().sum(-1)
            if masked:
                per_token = per_token[current[-1]["attention_mask"] == 1]
            totals[name] = totals.get(name, 0.0) + float(per_token.sum())

        return hook

    for i, target in enumerate(bank.targets):
        layer = model.get_submodule(target.name)
        handles.append(layer.register_forward_hook(count(i, target.name)))
    with torch.no_grad():
        for batch in data:
            current.append(batch)
            model(**batch)
    for handle in handles:
        handle.remove()
    return totals


# Offline


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "mask=None"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_probe_is_its_definition(dtype: torch.dtype, masked: bool) -> None:
    model, data = net().to(dtype), batches()
    expected = by_hooks(model, data, masked)
    scores = loradrop.probe(model, data) if masked else loradrop.probe(model, data, mask=None)
    assert list(scores) == [f"layers.{i}.{m}" for i in (0, 1) for m in ("query", "value")]
    assert dict(scores) == pytest.approx(expected, rel=1e-6 if dtype == torch.float64 else 1e-5)
    assert all(value > 0 for value in scores.values())
    real = sum(int(batch["attention_mask"].sum()) for batch in data)
    every = sum(batch["input_ids"].numel() for batch in data)
    assert scores.tokens == (real if masked else every) and real < every
    assert (scores.source, len(scores.rows), scores.rows.dtype) == ("offline", 4, torch.float64)
    assert injection_of(model).scores is scores


def test_probe_of_bert() -> None:
    from transformers import BertConfig, BertModel  # here: the processes below need not load it

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model: Any = BertModel(BertConfig(vocab_size=VOCABULARY, num_attention_heads=2, **size))
    targets = ["query", "value", "output.dense"]
    loradrop.inject(model, loradrop.LoRAConfig(r=R, target_modules=targets))
    wake(model.double())
    data = batches()
    expected = by_hooks(model.eval(), data)
    assert dict(loradrop.probe(model.train(), data)) == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_mask_counts_every_token() -> None:
    model, data = net(), batches()
    bare = [{"input_ids": batch["input_ids"]} for batch in data]
    every = loradrop.probe(model, data, mask=None)
    assert dict(loradrop.probe(model, bare)) == dict(every)
    assert every.tokens == loradrop.probe(model, bare).tokens


def test_the_mask_may_have_another_name_and_place() -> None:
    model, data = net(), batches()
    expected = dict(loradrop.probe(model, data))
    in_order = [(batch["input_ids"], batch["attention_mask"]) for batch in data]
    assert dict(loradrop.probe(model, in_order)) == expected
    as_bool = [b | {"attention_mask": b["attention_mask"].bool()} for b in data]
    assert dict(loradrop.probe(model, as_bool)) == expected

    class Renamed(Net):
        def forward(self, ids: Tensor, real: Tensor) -> Tensor:
            return super().forward(ids)

    model.__class__ = Renamed
    renamed = [{"ids": b["input_ids"], "real": b["attention_mask"]} for b in data]
    assert dict(loradrop.probe(model, renamed, mask="real")) == expected


def test_padding_that_is_not_finite_is_left_out() -> None:
    model = net()
    data = [b | {"input_ids": b["input_ids"] * b["attention_mask"]} for b in batches()]
    expected = dict(loradrop.probe(model, data))
    finite = [batch["input_ids"].clamp_min(1) * batch["attention_mask"] for batch in data]
    data = [b | {"input_ids": ids} for b, ids in zip(data, finite, strict=True)]
    clean = dict(loradrop.probe(model, data))
    with torch.no_grad():
        model.embed.weight[0] = float("nan")
    assert dict(loradrop.probe(model, data)) == clean
    assert expected.keys() == clean.keys()


Pair = namedtuple("Pair", ["input_ids", "attention_mask"])
KINDS: dict[str, Callable[[Batch], Any]] = {
    "dict": dict,
    "tuple": lambda b: tuple(b.values()),
    "list": lambda b: list(b.values()),
    "named tuple": lambda b: Pair(**b),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_kinds_of_batches(kind: Callable[[Batch], Any]) -> None:
    model, data = net(), batches()
    expected = dict(loradrop.probe(model, data))
    assert dict(loradrop.probe(model, (kind(batch) for batch in data))) == expected


def test_a_batch_of_one_tensor() -> None:
    model, data = net(), batches()
    alone = loradrop.probe(model, [batch["input_ids"] for batch in data])
    assert dict(alone) == dict(loradrop.probe(model, data, mask=None))


def test_mask_fn_weighs_per_target() -> None:
    model, data = net().double(), batches()
    asked: list[str] = []

    def only_first_layer(name: str, x: Tensor, mask: Tensor | None) -> Tensor | None:
        assert mask is not None and x.shape[:-1] == mask.shape
        asked.append(name)
        return mask if "layers.0" in name else 0.5 * torch.ones(x.shape[:-1])

    scores = loradrop.probe(model, data, mask_fn=only_first_layer)
    real, every = by_hooks(model, data), by_hooks(model, data, masked=False)
    for name, value in scores.items():
        want = real[name] if "layers.0" in name else 0.5 * every[name]
        assert value == pytest.approx(want, rel=1e-6)
    assert set(asked) == set(scores)
    all_of_them = loradrop.probe(model, data, mask_fn=lambda *_: None)
    assert dict(all_of_them) == pytest.approx(every, rel=1e-6)


class Packed(Net):
    """Its layers see the tokens of all sequences in one row."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids.flatten())


def test_a_mask_that_does_not_fit_names_the_target() -> None:
    model, data = net(), batches()
    model.__class__ = Packed
    with pytest.raises(ValueError, match=r"attention_mask.*layers\.0\.query") as raised:
        loradrop.probe(model, data)
    for part in ("(2, 5)", "(10, 12)", "mask=None", "mask_fn="):
        assert part in str(raised.value)
    by_row = loradrop.probe(model, data, mask_fn=lambda _, x, mask: mask.flatten())
    plain = net()
    assert dict(by_row) == pytest.approx(dict(loradrop.probe(plain, data)), rel=1e-5)
    with pytest.raises(ValueError, match=r"mask_fn.*layers\.0\.query"):
        loradrop.probe(model, data, mask_fn=lambda _, x, mask: mask)


def test_a_mask_that_is_no_tensor() -> None:
    data = [b | {"attention_mask": b["attention_mask"].tolist()} for b in batches()]
    with pytest.raises(ValueError, match=r"attention_mask.*list"):
        loradrop.probe(net(), data)


class Partly(Net):
    """Never calls the value of its last layer."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.layers[0](self.embed(input_ids))
        return self.layers[1].query(x)


def test_a_target_that_is_never_called_is_named() -> None:
    model = net()
    model.__class__ = Partly
    with pytest.raises(RuntimeError, match=r"forward of layers\.1\.value was never called"):
        loradrop.probe(model, batches())
    collector = Collector(model, model.lora_bank, online=True)
    model(**batches()[0]).sum().backward()
    with pytest.raises(RuntimeError, match=r"forward of layers\.1\.value was never called"):
        collector.close_row()
    collector.detach()


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="empty"):
        loradrop.probe(net(), [])


def test_everything_is_as_before() -> None:
    model = net(lora_dropout=0.5)
    model.train()
    model.layers[1].eval()
    model(**batches()[0]).sum().backward()

    def state() -> list[Any]:
        return [
            [module.training for module in model.modules()],
            {k: v.clone() for k, v in model.state_dict().items()},
            {k: (p.requires_grad, p.grad) for k, p in model.named_parameters()},
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            (random.getstate(), torch.get_rng_state(), np.random.get_state()[1]),
            model.lora_bank.collector,
        ]

    def drawing() -> Iterable[Batch]:
        for batch in batches():
            random.random(), np.random.rand(), torch.rand(1)
            assert not any(module.training for module in model.modules())
            yield batch

    before = state()
    first = loradrop.probe(model, drawing())
    after = state()
    flat = (torch.utils._pytree.tree_leaves(leaves) for leaves in (before, after))
    for one, two in zip(*flat, strict=True):
        same = torch.equal if isinstance(one, Tensor) else np.array_equal
        assert same(one, two)
    assert dict(loradrop.probe(model, drawing())) == dict(first)
    with pytest.raises(ZeroDivisionError):
        loradrop.probe(model, (1 / 0 for _ in range(3)))
    assert state()[0] == before[0] and state()[3] == before[3] and state()[5] is None


def test_scores_of_fresh_adapters_say_so() -> None:
    model = net()
    with torch.no_grad():
        for B in model.lora_bank.B:
            B.zero_()
    scores = loradrop.probe(model, batches())
    assert set(scores.values()) == {0.0}
    with pytest.raises(ValueError, match="B is still zero"):
        loradrop.select(scores, threshold=0.9)


def test_a_score_that_is_nan_names_its_target() -> None:
    model = net()
    with torch.no_grad():
        model.lora_bank.factors(2)[1][0, 0] = float("nan")
    scores = loradrop.probe(model, batches())
    assert scores["layers.0.query"] > 0 and scores["layers.1.query"] != scores["layers.1.query"]
    with pytest.raises(ValueError, match=r"layers\.1\.query is nan"):
        loradrop.select(scores, threshold=0.9)


@pytest.mark.parametrize("how", ["group", "none"])
def test_targets_that_share_are_measured_apart(how: str) -> None:
    model, data = net().double(), batches()
    loradrop.share(model, ["layers.0.query"], share=how)
    wake(model)
    scores = loradrop.probe(model, data)
    if how == "group":
        assert dict(scores) == pytest.approx(by_hooks(model, data), rel=1e-6)
        assert len(set(scores.values())) == 4
    else:
        assert [value > 0 for value in scores.values()] == [True, False, False, False]


# Online


def step(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    return model(**batch).square().mean()


def online(model: Any, data: list[Batch], run: Any = None, accumulate: int = 1) -> Scores:
    """Scores of training passes over `data` with fixed weights."""
    collector = Collector(model, model.lora_bank, online=True)
    model.train()
    try:
        for i, batch in enumerate(data, 1):
            (1000.0 * step(model if run is None else run, batch)).backward()
            if i % accumulate == 0:
                collector.close_row()
                model.zero_grad()
        return collector.scores()
    finally:
        collector.detach()


@pytest.mark.parametrize(
    "reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_online_equals_offline(reentrant: bool | None, accumulate: int) -> None:
    model, data = net(reentrant), batches()
    offline = loradrop.probe(model, data)
    scores = online(model, data, accumulate=accumulate)
    assert scores.source == "online" and scores.tokens == offline.tokens
    expected = offline.rows.view(-1, accumulate, 4).sum(1)
    assert scores.rows.shape == expected.shape and expected.min() > 0
    torch.testing.assert_close(scores.rows, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "model.compile"])
def test_online_equals_offline_when_compiled(in_place: bool) -> None:
    model, data = net(), batches(2)
    offline = loradrop.probe(model, data)
    torch.compiler.reset()
    fast = None
    if in_place:
        model.compile(backend="aot_eager")
    else:
        fast = torch.compile(model, backend="aot_eager")
    scores = online(model, data, fast)
    torch.testing.assert_close(scores.rows, offline.rows, rtol=1e-6, atol=0)
    assert scores.tokens == offline.tokens


def test_online_equals_offline_under_autocast() -> None:
    model, data = net(), batches()
    plain = loradrop.probe(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        offline = loradrop.probe(model, data)

    def run(**batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)

    scores = online(model, data, run)
    torch.testing.assert_close(scores.rows, offline.rows, rtol=1e-12, atol=0)
    assert dict(scores) == pytest.approx(dict(plain), rel=0.02) and dict(scores) != dict(plain)


def test_evaluation_between_steps_counts_nothing() -> None:
    model, data = net(), batches()
    offline = loradrop.probe(model, data)

    def run(**batch: Tensor) -> Tensor:
        with torch.no_grad():
            model(**data[0])
        return model(**batch)

    scores = online(model, data, run)
    torch.testing.assert_close(scores.rows, offline.rows, rtol=1e-12, atol=0)
    assert scores.tokens == offline.tokens


def test_generating_between_steps_needs_no_mask_that_fits() -> None:
    """With a KV cache the mask is longer than the tokens; and there is nothing to collect."""
    model, data = net(), batches(1)
    collector = Collector(model, model.lora_bank, online=True)
    with torch.no_grad():
        model(data[0]["input_ids"], torch.ones(2, 99))
    collector.detach()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_evaluation_before_a_backward_leaves_its_mask_alone(reentrant: bool) -> None:
    model, batch = net(reentrant), batches(1)[0]
    expected = loradrop.probe(model, [batch]).rows[0]
    collector = Collector(model, model.lora_bank, online=True)
    loss = step(model, batch)
    with torch.no_grad():
        model(batch["input_ids"], torch.ones_like(batch["attention_mask"]))
    loss.backward()
    collector.close_row()
    collector.detach()
    torch.testing.assert_close(collector.scores().rows[0], expected, rtol=1e-12, atol=0)


def test_two_passes_of_one_backward() -> None:
    """As contrastive losses have; each keeps the mask it came with."""
    model, data = net(), batches(2)
    expected = loradrop.probe(model, data).rows.sum(0)
    collector = Collector(model, model.lora_bank, online=True)
    (step(model, data[0]) + step(model, data[1])).backward()
    collector.close_row()
    collector.detach()
    torch.testing.assert_close(collector.scores().rows[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_two_checkpointed_passes_of_one_backward_are_never_guessed(reentrant: bool) -> None:
    model, first = net(reentrant), batches(1)[0]
    data = [first, first | {"attention_mask": torch.ones_like(first["attention_mask"])}]
    expected = loradrop.probe(model, data).rows.sum(0)
    collector = Collector(model, model.lora_bank, online=True)
    loss = step(model, data[0]) + step(model, data[1])
    try:
        loss.backward()
        collector.close_row()
    except (RuntimeError, ValueError) as error:
        assert "mask=None" in str(error)
    else:
        torch.testing.assert_close(collector.scores().rows[0], expected, rtol=1e-12, atol=0)
    collector.detach()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_passes_without_mask(reentrant: bool) -> None:
    model, data = net(reentrant), batches(2)
    expected = loradrop.probe(model, data, mask=None)
    collector = Collector(model, model.lora_bank, online=True, mask=None)
    (step(model, data[0]) + step(model, data[1])).backward()
    collector.close_row()
    collector.detach()
    scores = collector.scores()
    torch.testing.assert_close(scores.rows[0], expected.rows.sum(0), rtol=1e-12, atol=0)
    assert scores.tokens == expected.tokens


def test_collecting_changes_no_gradient() -> None:
    model, data = net(lora_dropout=0.3), batches()
    gradients = []
    for collect in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        collector = Collector(model, model.lora_bank, online=True) if collect else None
        sum(step(model, batch) for batch in data).backward()
        if collector is not None:
            collector.close_row()
            collector.detach()
        gradients.append([p.grad.clone() for p in model.lora_bank.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert one.any() and torch.equal(one, two)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_online_statistics_of_shared_adapters() -> None:
    model, data = net(), batches()
    loradrop.share(model, ["layers.0.query"])
    wake(model)
    offline = loradrop.probe(model, data)
    torch.testing.assert_close(online(model, data).rows, offline.rows, rtol=1e-12, atol=0)
    assert len(set(offline.values())) == 4


def test_a_collector_goes_on_from_its_state() -> None:
    model, data = net(), batches()
    whole = online(model, data)
    first = Collector(model, model.lora_bank, online=True)
    for batch in data[:2]:
        step(model, batch).backward()
        first.close_row()
    state = copy.deepcopy(first.state_dict())
    first.detach()
    second = Collector(model, model.lora_bank, online=True)
    second.load_state_dict(state)
    for batch in data[2:]:
        step(model, batch).backward()
        second.close_row()
    second.detach()
    torch.testing.assert_close(second.scores().rows, whole.rows, rtol=1e-12, atol=0)
    assert second.scores().tokens == whole.tokens


# Two processes

RANKS = 2


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
    gradients = [p.grad for p in model.lora_bank.parameters()]
    moments = collector.close_row()["moment"]
    scores = collector.scores()
    resumed = Collector(model, model.lora_bank, online=True)
    resumed.load_state_dict(collector.state_dict())
    again = resumed.scores()
    torch.save(
        {
            "online": dict(scores),
            "resumed": (dict(again), again.tokens),
            "offline": dict(offline),
            "tokens": (scores.tokens, offline.tokens),
            "gradients": gradients,
            "moments": moments,
        },
        Path(folder) / f"rank{rank}.pt",
    )
    distributed.destroy_process_group()


def test_scores_are_summed_over_ranks(tmp_path: Path) -> None:
    multiprocessing.spawn(on_rank, (str(tmp_path),), RANKS)
    zero, one = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS))
    model, data = net(), batches(4)
    expected = loradrop.probe(model, data)
    for got in (zero, one):
        assert got["online"] == pytest.approx(dict(expected), rel=1e-6)
        assert got["offline"] == pytest.approx(dict(expected), rel=1e-6)
        assert got["tokens"] == (expected.tokens, expected.tokens)
        assert got["resumed"] == (got["online"], expected.tokens)  # each rank's part once
    collector = Collector(model, model.lora_bank, online=True, statistics=["moment"])
    sum(step(model, batch) / RANKS for batch in data).backward()
    moments = collector.close_row()["moment"]
    for got in (zero, one):
        for found, want in zip(got["moments"], moments, strict=True):
            assert want.min() > 0
            torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
    gradients = [p.grad for p in model.lora_bank.parameters()]
    for first, second, want in zip(zero["gradients"], one["gradients"], gradients, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, want, rtol=1e-5, atol=1e-6)
