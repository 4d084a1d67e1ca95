"""Gram matrices of both passes are their explicit sums, however the model runs."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import VOCABULARY, R, bert, llama, net, wake
from probe_cases import RANKS, Batch, batches, collecting, in_two_parts
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torchrun import in_ranks, leave

import loradrop
from loradrop.injection import injection_of
from loradrop.scores import Grams, Scores
from loradrop.statistics import losses
from loradrop.statistics.collector import GRAMS, Collector

pytestmark = pytest.mark.numbers

NAMES = ("sqnorm", *GRAMS)
KINDS = ("inputs", "left", "right")


def each(outputs: Tensor, given: Any = None) -> Tensor:
    """The loss of each sample of a `Net`."""
    return outputs.square().mean((1, 2))


def step(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    return each(model(**batch)).mean()


def explicit(
    model: Any,
    data: list[Batch],
    loss: Callable[[Any, Batch], Tensor] = each,
    accumulate: int = 1,
) -> dict[str, list[Tensor]]:
    """Σ w h hᵀ, and Σ S Sᵀ and Σ SᵀS of S = s Σ u hᵀ over the tokens of a step, by hooks."""
    bank, handles = model.lora_bank, []
    found = {kind: [torch.zeros(R, R).double() for _ in bank.targets] for kind in KINDS}
    cores: list[dict[int, Tensor]] = [{}]
    mask = [torch.zeros(0)]

    def watch(i: int) -> Callable[..., None]:
        def forward(_: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            A, B = (factor.detach().double() for factor in bank.factors(i))
            w = mask[0].double().reshape(-1)
            h = args[0].detach().double().reshape(-1, A.shape[1]) @ A.T
            found["inputs"][i].add_(h.T @ (w[:, None] * h))

            def backward(dy: Tensor) -> None:
                u = dy.double().reshape(-1, B.shape[0]) @ B
                first = members[i]
                core = bank.scaling[i] * u.T @ h
                cores[0][first] = cores[0].get(first, torch.zeros(R, R).double()) + core

            y.register_hook(backward)

        return forward

    members = [bank.slots.index(slot) for slot in bank.slots]
    for i, target in enumerate(bank.targets):
        layer = model.get_submodule(target.name)
        handles.append(layer.register_forward_hook(watch(i)))
    for number, batch in enumerate(data, 1):
        mask[0] = batch["attention_mask"]
        loss(model(**batch), batch).sum().backward()
        if number % accumulate == 0:
            for i, core in cores[0].items():
                found["left"][i].add_(core @ core.T)
                found["right"][i].add_(core.T @ core)
            cores[0] = {}
    model.zero_grad()
    for handle in handles:
        handle.remove()
    return found


def assert_grams(found: Scores | Grams, want: dict[str, list[Tensor]], rtol: float) -> None:
    grams = found.grams if isinstance(found, Scores) else found
    assert grams is not None
    for kind in KINDS:
        for i, (one, two) in enumerate(zip(getattr(grams, kind), want[kind], strict=True)):
            shared_before = kind != "inputs" and grams.slots.index(grams.slots[i]) != i
            if shared_before:  # it is counted at the first member
                assert one is None and not two.any()
                continue
            assert_close(one, two, rtol=rtol, atol=rtol * float(two.trace()))
            assert two.trace() > 0


def online(model: Any, data: list[Batch], run: Any = None, accumulate: int = 1) -> Scores:
    """Of training passes whose loss is the mean over the samples of a step."""
    model.train()
    with collecting(model, statistics=NAMES) as collector:
        for start in range(0, len(data), accumulate):
            part = data[start : start + accumulate]
            n = sum(len(batch["input_ids"]) for batch in part)
            for batch in part:
                loss = step(model if run is None else run, batch)
                (loss * len(batch["input_ids"]) / n * 1024.0).backward()  # as a loss scaler does
            collector.loss_scale = 1024.0
            collector.close_row()
            model.zero_grad()
        return collector.scores()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_probe(dtype: torch.dtype) -> None:
    model, data = net().to(dtype), batches()
    before = copy.deepcopy(model.state_dict())
    plain = loradrop.probe(model, data)
    scores = loradrop.probe(model, data, gram=True, labels=each)
    exact = 1e-11 if dtype == torch.float64 else 1e-5
    assert_grams(scores, explicit(model, data), exact)
    assert_close(scores.rows, plain.rows, rtol=exact, atol=0)
    assert (scores.source, scores.tokens) == ("offline", plain.tokens)
    assert scores.grams is not None and scores.grams.samples == sum(
        len(batch["input_ids"]) for batch in data
    )
    for name in scores:
        assert sum(loradrop.spectrum(scores, "output")[name]) == pytest.approx(scores[name])
    assert all(p.grad is None and p.requires_grad for p in model.lora_bank.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert injection_of(model).scores is scores and not model._forward_hooks


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_online(reentrant: bool | None, accumulate: int) -> None:
    model, data = net(reentrant).double(), batches()
    scores = online(model, data, accumulate=accumulate)
    assert_grams(scores, explicit(net().double(), data, accumulate=accumulate), 1e-10)
    assert scores.source == "online" and len(scores.rows) == 4 // accumulate


def test_online_when_compiled() -> None:
    model, data = net(), batches(2)
    torch.compiler.reset()
    scores = online(model, data, torch.compile(model, backend="aot_eager"))
    assert_grams(scores, explicit(model, data), 1e-5)


def test_online_under_autocast() -> None:
    model, data = net(), batches()
    scores = online(model, data, torch.autocast("cpu", torch.bfloat16)(model.__call__))
    assert_grams(scores, explicit(model, data), 0.05)


def test_members_of_a_shared_adapter_add_up() -> None:
    model, data = net().double(), batches()
    loradrop.share(model, ["layers.0.query"])
    scores = loradrop.probe(wake(model), data, gram=True, labels=each)
    want = explicit(model, data)
    assert_grams(scores, want, 1e-11)
    one, two = (i for i, s in enumerate(model.lora_bank.slots) if s == model.lora_bank.slots[1])
    found = loradrop.spectrum(scores, "loss")
    values = found[scores.targets[one].name]
    left, right = want["left"][one], want["right"][one]
    unit = 1 / (2 * scores.grams.samples * left.trace())
    assert values == found[scores.targets[two].name]
    assert sum(values) == pytest.approx(float(unit * torch.trace(left @ right)))


def test_a_step_that_overflowed_leaves_its_gradients_out() -> None:
    model, data = net().double(), batches()
    with collecting(model, statistics=NAMES) as collector:
        for i, batch in enumerate(data):
            loss = step(model, batch)
            (loss * (float("inf") if i == 2 else 1.0)).backward()
            collector.close_row()
        scores = collector.scores()
    want = explicit(model, [data[0], data[1], data[3]])
    assert_grams(scores, want | {"inputs": explicit(model, data)["inputs"]}, 1e-10)


def test_a_probe_that_meets_no_number_says_so() -> None:
    """It has no loss scaler that would leave a batch out."""
    model, data = net().double(), batches()
    counted = iter((1.0, float("nan"), 1.0, 1.0))

    def labels(outputs: Any, inputs: Any) -> Any:
        return outputs.flatten(1).square().sum(1) * next(counted)

    scores = loradrop.probe(model, data, gram=True, labels=labels)
    with pytest.raises(ValueError, match="is not finite"):
        loradrop.spectrum(scores)


def test_a_shared_adapter_is_worth_what_it_does_at_every_member() -> None:
    model, data = net(alpha_pattern={r"1\.\w+": 7.0}).double(), batches()
    loradrop.share(model, [])
    wake(model)
    scores = loradrop.probe(model, data, gram=True)
    bank = model.lora_bank
    assert len({*bank.slots}) < len(bank.slots) and len({*bank.scaling}) > 1
    assert loradrop.spectrum(scores, "output").total == pytest.approx(sum(scores.values()))
    deltas = [bank.delta(i).double().square().sum() for i in range(len(bank.targets))]
    assert loradrop.spectrum(scores, "weight").total == pytest.approx(float(sum(deltas)))


def test_a_collector_goes_on_from_its_state() -> None:
    model, data = net().double(), batches()
    found = in_two_parts(model, data, step, statistics=NAMES)
    assert_grams(found, explicit(model, data), 1e-10)


def test_what_was_forgotten_does_not_count() -> None:
    model, data = net().double(), batches()
    with collecting(model, statistics=NAMES) as collector:
        for i, batch in enumerate(data):
            step(model, batch).backward()
            collector.close_row()
            if i == 1:
                collector.forget()
    assert_grams(collector.scores(), explicit(model, data[2:]), 1e-10)
    assert len(collector.rows) == 2


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    model, mine = net().double(), batches(4)[rank::RANKS]
    parallel = DistributedDataParallel(model)
    collector = Collector(model, model.lora_bank, online=True, statistics=NAMES)
    for batch in mine:
        step(parallel, batch).backward()
        collector.close_row()
    state = collector.state_dict()
    resumed = Collector(model, model.lora_bank, online=True, statistics=NAMES)
    resumed.load_state_dict(state)
    torch.save([collector.scores().grams, resumed.scores().grams], f"{folder}/rank{rank}.pt")
    leave()


def test_they_are_summed_over_ranks(tmp_path: Path) -> None:
    assert not any(in_ranks(on_rank, str(tmp_path), processes=RANKS))
    want = explicit(net().double(), batches(4))
    for rank in range(RANKS):
        for grams in torch.load(tmp_path / f"rank{rank}.pt", weights_only=False):
            assert_grams(grams, want, 1e-10)
            assert grams.samples == sum(len(batch["input_ids"]) for batch in batches(4))


# Whose loss


def classifier(cls: str = "ForSequenceClassification", **options: Any) -> Any:
    model = bert(2, cls=cls)
    for name, value in options.items():
        setattr(model.config, name, value)
    loradrop.inject(model, loradrop.LoRAConfig(r=R))
    return wake(model.double())


def labelled(batch: Batch, labels: Tensor) -> Batch:
    return {**batch, "labels": labels}


def test_labels_of_the_data() -> None:
    model, data = classifier(), batches()
    data = [labelled(b, torch.arange(len(b["input_ids"])) % 2) for b in data]
    scores = loradrop.probe(model, data, gram=True, labels="data")
    want = explicit(model, data, lambda out, batch: out.loss * len(batch["labels"]))
    assert_grams(scores, want, 1e-6)  # the loss is summed in float32


def fisher(model: Any, data: list[Batch], weights: Callable[[Any, Batch], Any]) -> list[Tensor]:
    """E Σ S Sᵀ over all labels a model can draw, by a backward pass for each of them."""
    total: list[Tensor] = []
    for batch in data:
        for weight, loss in weights(model(**batch), batch):
            found = explicit(model, [batch], lambda out, b, loss=loss: loss(out))
            part = [float(weight) * value for value in found["left"]]
            total = part if not total else [a + b for a, b in zip(total, part, strict=True)]
    return total


def test_drawn_labels_give_the_fisher_matrix() -> None:
    """Of one sample, over many draws: the mean is the sum over classes, weighed by their odds."""
    model = classifier()
    batch = {key: value[:1] for key, value in batches(1)[0].items()}

    def classes(out: Any, _: Batch) -> Any:
        odds = out.logits.detach().softmax(-1)[0]
        return [(odds[c], lambda o, c=c: -o.logits.log_softmax(-1)[:, c]) for c in range(len(odds))]

    want, draws = fisher(model, [batch], classes), 600
    grams = loradrop.probe(model, [batch] * draws, gram=True).grams
    assert grams is not None and grams.samples == draws
    for got, expected in zip(grams.left, want, strict=True):
        assert got is not None
        assert_close(got / draws, expected, rtol=0.0, atol=0.2 * float(expected.trace()))
    again = loradrop.probe(model, [batch] * draws, gram=True).grams
    assert again is not None and all(map(torch.equal, grams.left, again.left))


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_drawn_labels_of_other_heads(kind: str) -> None:
    """Their Fisher matrix is the curvature of the loss that such a model is trained with."""
    model = classifier(problem_type=kind)
    batch = {key: value[:1] for key, value in batches(1)[0].items()}
    draws = 800
    grams = loradrop.probe(model, [batch] * draws, gram=True).grams
    assert grams is not None and grams.samples == draws
    logits = model(**batch).logits.detach()[0]
    odds = logits.sigmoid()
    curvature = 2.0 + 0 * logits if kind == "regression" else odds * (1 - odds)
    want = None
    for c, weight in enumerate(curvature / len(logits)):
        found = explicit(model, [batch], lambda out, b, c=c: out.logits[:, c])
        part = [float(weight) * value for value in found["left"]]
        want = part if want is None else [a + b for a, b in zip(want, part, strict=True)]
    assert want is not None
    for got, expected in zip(grams.left, want, strict=True):
        assert got is not None
        assert_close(got / draws, expected, rtol=0.0, atol=0.2 * float(expected.trace()))


def test_tokens_that_have_no_label_are_no_samples() -> None:
    model = llama()
    loradrop.inject(model, loradrop.LoRAConfig(r=R))
    ids = torch.randint(2, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    plain = {"input_ids": ids, "attention_mask": mask}
    labels = torch.where(mask > 0, ids, -100)
    labels[:, :2] = -100  # a prompt of two tokens
    for batch, count in ((plain, 10), (labelled(plain, labels), 4 + 2)):
        grams = loradrop.probe(model, [batch], gram=True).grams
        assert grams is not None and grams.samples == count


def test_the_first_token_of_a_row_is_no_sample() -> None:
    """Nothing predicts it, whoever gives the labels, and in training too."""
    model = llama()
    loradrop.inject(model, loradrop.LoRAConfig(r=R))
    ids = torch.randint(2, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = labelled({"input_ids": ids}, ids)
    for labels in ("sampled", "data"):
        grams = loradrop.probe(model, [batch], gram=True, labels=labels).grams
        assert grams is not None and grams.samples == 2 * 5
    collector = Collector(model, model.lora_bank, online=True, statistics=NAMES)
    model(**batch).loss.backward()
    collector.close_row()
    grams = collector.scores().grams
    assert grams is not None and grams.samples == 2 * 5


@pytest.mark.parametrize("family", ["gpt2", "llava", "t5", "bert"])
def test_a_label_is_of_the_token_that_predicts_it(family: str) -> None:
    """Which rows of the logits the loss reads: their gradients are not zero."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    eyes = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=4, patch_size=2, projection_dim=16,
    )  # fmt: skip
    makes: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
        ),
        "llava": lambda: transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=eyes, text_config=text)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                decoder_start_token_id=0,
            )
        ),
        "bert": lambda: transformers.BertForTokenClassification(
            transformers.BertConfig(**sizes, num_labels=32)
        ),
    }  # fmt: skip
    model = makes[family]().eval()
    ids = torch.tensor([[7, 5, 9, 4, 8, 3]])
    batch = {"input_ids": ids, "labels": torch.tensor([[-100, -100, 9, 4, -100, -100]])}
    out = model(**batch)
    out.logits.retain_grad()
    out.loss.backward()
    reads = out.logits.grad.abs().sum(-1) > 0
    counts = losses._counting(model, out.logits, batch)
    assert counts is not None and counts.tolist() == reads.tolist() and int(reads.sum()) == 2


def test_without_labels_the_output_metric_is_left() -> None:
    model, data = net(), batches()
    scores = loradrop.probe(model, data, gram=True, labels=None)
    assert sum(loradrop.spectrum(scores, "output")["layers.0.query"]) == pytest.approx(
        scores["layers.0.query"]
    )
    with pytest.raises(ValueError, match=r"metric='loss' needs statistics.*labels="):
        loradrop.spectrum(scores, "loss")


class Images(nn.Module):
    """Five classes for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x.movedim(1, -1)).movedim(-1, 1)}


def images() -> Any:
    model = Images()
    loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules=["head"]))
    return model


def of_pixels(outputs: Any, given: Any) -> Tensor:
    return -outputs["logits"].log_softmax(1)[:, 0].flatten()


def test_losses_that_are_not_there_are_named() -> None:
    model, data = net(), batches()
    with pytest.raises(ValueError, match="labels='true': choose one of sampled, data"):
        loradrop.probe(model, data, gram=True, labels="true")
    with pytest.raises(ValueError, match="needs a loss, and the model returned none"):
        loradrop.probe(model, data, gram=True, labels="data")
    with pytest.raises(ValueError, match="the loss of each sample"):
        loradrop.probe(model, data, gram=True, labels=lambda out, given: out.sum())
    pixels = wake(images())
    data = [{"x": torch.randn(2, 3, 4, 4)}]
    with pytest.raises(ValueError, match=r"shape \(2, 5, 4, 4\), which do not say which .* axes"):
        loradrop.probe(pixels, data, gram=True)
    scores = loradrop.probe(pixels, data, gram=True, labels=of_pixels)
    assert scores.grams is not None and scores.grams.samples == 2 * 4 * 4
    bare, data = classifier("Model"), batches()
    with pytest.raises(ValueError, match="BertModel returns no logits"):
        loradrop.probe(bare, data, gram=True)
    assert bare.lora_bank.collector is None and bare.lora_bank.factors(0)[0].requires_grad
