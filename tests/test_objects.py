"""An injected model as what it is to Python and PyTorch: an object that is copied, freed, cast,
averaged, pruned, and interrupted.
"""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import serving
from models import IDS, bert, llama
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import Trainer, TrainerCallback, TrainingArguments

import loradrop
from loradrop.native import FOLDER, TENSORS

QV = loradrop.LoRAConfig(r=2, target_modules=["query", "value"])
ROWS = [{"input_ids": ids, "labels": int(ids[0]) % 2} for ids in IDS.repeat(4, 1)]


def injected(config: loradrop.LoRAConfig = QV, seed: int = 0) -> Any:
    model = bert()
    loradrop.inject(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for B in model.lora_bank.B:
            B.copy_(0.1 * torch.randn(B.shape, generator=generator))
    return model


# ---- Its life ----------------------------------------------------------------------------------


def test_nothing_keeps_a_model_alive() -> None:
    """As `del model` frees any other one: on a GPU the next one needs its room."""
    model = injected()
    weight = weakref.ref(model.bert.embeddings.word_embeddings.weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_copies_save_themselves(tmp_path: Path) -> None:
    model = injected()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    for i, one in enumerate(copies):
        with torch.no_grad():
            one.lora_bank.B[0].fill_(float(i))
        for saves, folder in ((one, tmp_path / f"{i}"), (one.bert, tmp_path / f"part {i}")):
            saves.save_pretrained(folder)
        found = bert()
        loradrop.load(found, tmp_path / f"{i}" / FOLDER)
        assert torch.equal(found.lora_bank.B[0], one.lora_bank.B[0])
    saver = injected().save_pretrained
    with pytest.raises(ReferenceError, match="keep a reference"):
        saver(tmp_path / "gone")


def test_a_save_pretrained_of_its_own_is_called_and_comes_back(tmp_path: Path) -> None:
    model, called = bert(), []

    def mine(folder: Any, **options: Any) -> str:
        called.append((Path(folder), "lora_bank" in model._modules))
        Path(folder).mkdir()
        return "mine"

    model.save_pretrained = mine
    loradrop.inject(model, QV)
    assert model.save_pretrained(tmp_path / "saved") == "mine"
    assert called == [(tmp_path / "saved", False)]
    assert (tmp_path / "saved" / FOLDER / TENSORS).exists()
    assert copy.deepcopy(model).save_pretrained(tmp_path / "copied") == "mine"
    loradrop.remove(model)
    assert model.save_pretrained is mine


def test_what_is_pushed_has_the_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = injected()
    for module in ("huggingface_hub.constants", "huggingface_hub.hf_api"):
        monkeypatch.setattr(f"{module}.ENDPOINT", "", raising=False)
    with serving() as hub:
        for module in ("huggingface_hub.constants", "huggingface_hub.hf_api"):
            monkeypatch.setattr(f"{module}.ENDPOINT", hub.url, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        more = {"repo_id": "someone/adapter", "private": True, "token": "hf_secret"}
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, **more)
    pushed = {f"{FOLDER}/{TENSORS}", f"{FOLDER}/plan.json", "config.json", "model.safetensors"}
    assert pushed <= set(hub.files) and hub.private is True
    assert hub.tokens == {"Bearer hf_secret"}
    for name in pushed:
        assert (tmp_path / "mine" / name).exists()


# ---- Its numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixed",
    [
        lambda a, b: (a + b) / 2, lambda a, b: 0.9 * a + 0.1 * b,
        lambda a, b: torch.stack([a, b]).float().mean(0), lambda a, _: a.double(),
        lambda a, _: a.bfloat16(), lambda a, _: a.half(), lambda a, _: a.float(),
    ],
    ids=["mean", "ema", "float mean", "double", "bfloat16", "half", "float"],
)  # fmt: skip
def test_averages_and_casts_of_state_dicts_load(mixed: Callable[[Tensor, Tensor], Tensor]) -> None:
    one, other, found = injected(), injected(seed=1), injected(seed=2)
    first = one.lora_bank.targets[0].name
    for model in (one, other, found):
        loradrop.share(model, [first])
    a, b = one.state_dict(), other.state_dict()
    found.load_state_dict({key: mixed(a[key], b[key]) for key in a})
    assert found.lora_bank.assignment == one.lora_bank.assignment
    expected = mixed(a["lora_bank.pairs.0.B"], b["lora_bank.pairs.0.B"]).float()
    assert torch.equal(found.lora_bank.B[0], expected)


def test_state_dicts_that_share_differently_have_no_average() -> None:
    one, other = injected(), injected(seed=1)
    loradrop.share(one, [one.lora_bank.targets[0].name])
    loradrop.share(other, [other.lora_bank.targets[2].name])
    a, b = one.state_dict(), other.state_dict()
    mean = {key: (a[key] + b[key]) / 2 for key in a}
    with pytest.raises(RuntimeError, match="average of state dicts that share differently"):
        one.load_state_dict(mean)
    wrong = injected(loradrop.LoRAConfig(r=2, target_modules=["key", "value"])).state_dict()
    with pytest.raises(RuntimeError, match="adapts other targets"):
        injected().load_state_dict({k: v.float() for k, v in wrong.items()}, strict=False)


def test_a_narrow_type_cannot_count_many_adapters() -> None:
    layers = {f"layer_{i}": nn.Linear(2, 2) for i in range(300)}
    model = nn.ModuleDict(layers)
    loradrop.inject(model, loradrop.LoRAConfig(r=1, target_modules="all-linear"))
    state = model.state_dict()
    model.load_state_dict({key: value.float() for key, value in state.items()})
    with pytest.raises(RuntimeError, match="of a narrow type"):
        model.load_state_dict({key: value.bfloat16() for key, value in state.items()})
    fewer = nn.ModuleDict(dict([*layers.items()][:250]))
    loradrop.remove(model)
    loradrop.inject(fewer, loradrop.LoRAConfig(r=1, target_modules="all-linear"))
    state = fewer.state_dict()
    fewer.load_state_dict({key: value.bfloat16() for key, value in state.items()})
    assert fewer.lora_bank.slots == tuple(range(250))


def test_a_model_that_was_double_for_a_while() -> None:
    """As for a gradcheck: the adapters follow up and down, but not below float32."""
    model = injected()
    before = [B.clone() for B in model.lora_bank.B]
    for cast, dtype in ((model.double, torch.float64), (model.float, torch.float32)):
        cast()
        assert {p.dtype for p in model.lora_bank.parameters()} == {dtype}
    assert all(map(torch.equal, model.lora_bank.B, before))
    model.double().bfloat16()
    assert {p.dtype for p in model.lora_bank.parameters()} == {torch.float32}


@pytest.mark.parametrize("how", ["prune", "weight_norm"])
def test_adapters_that_are_pruned_or_parametrised(how: str) -> None:
    """Over several steps: what they compute with follows what is trained."""
    model = injected()
    pair = model.lora_bank.pairs[0]
    if how == "prune":
        prune.l1_unstructured(pair, "B", 0.5)
    else:
        parametrizations.weight_norm(pair, "B")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    outputs = []
    for _ in range(3):
        loss = model(IDS, labels=torch.tensor([0, 1, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(float(loss))
    assert len(set(outputs)) == 3
    if how == "prune":
        assert int((pair.B == 0).sum()) >= pair.B.numel() // 2


def test_a_layer_without_a_size_is_named() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    config = loradrop.LoRAConfig(r=2, target_modules=["0"])
    with pytest.raises(ValueError, match="'0' is a LazyLinear without a size yet: call the model"):
        loradrop.inject(model, config)
    model(torch.zeros(1, 3))
    loradrop.inject(model, config)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_dropout_is_not_traced() -> None:
    model = injected(loradrop.LoRAConfig(r=2, lora_dropout=0.1)).train()
    model.config.return_dict = False
    with pytest.raises(RuntimeError, match="trace in eval mode"):
        torch.jit.trace(model, IDS)


# ---- Its statistics ----------------------------------------------------------------------------


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


class Probes(TrainerCallback):
    """A user's own look in the middle of the warm-up."""

    def __init__(self, gram: bool) -> None:
        self.gram = gram

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 2:
            was = model.training
            loradrop.probe(model, [{"input_ids": IDS}], gram=self.gram, labels=None)
            model.train(was)


DROP = loradrop.LoraDropConfig(r=2, target_modules=["query", "value"], keep=2, probe_steps=4)


def trainer(model: Any, folder: Path, *callbacks: TrainerCallback) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", learning_rate=1e-2, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    return Trainer(
        model, args, train_dataset=ROWS, callbacks=[loradrop.LoraDropCallback(), *callbacks]
    )


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_interrupted_warm_up_leaves_nothing_behind(tmp_path: Path) -> None:
    model = bert()
    loradrop.inject(model, DROP)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, Interrupt()).train()
    assert hooks_of(model)
    again = trainer(model, tmp_path)
    again.train()
    assert hooks_of(model) == 0 and model.lora_bank.collector is None
    assert model.lora_bank.assignment.decided

    model = bert()
    loradrop.inject(model, DROP)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, Interrupt()).train()
    loradrop.remove(model)
    assert hooks_of(model) == 0
    assert b"loradrop" not in pickle.dumps(model)


@pytest.mark.parametrize("gram", [False, True])
def test_a_probe_in_the_middle_of_a_warm_up_changes_nothing(gram: bool, tmp_path: Path) -> None:
    found = []
    for callbacks in ((), (Probes(gram),)):
        torch.manual_seed(0)
        model = bert()
        loradrop.inject(model, DROP)
        trainer(model, tmp_path, *callbacks).train()
        found.append(loradrop.injection.plan_of(model))
    plain, probed = found
    assert plain.scores == probed.scores and plain.kept == probed.kept


def test_a_bar_that_is_not_wanted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def printed(**extra: Any) -> str:
        args = loradrop.TrainConfig(steps=2, batch_size=2, save_every=9, extra=extra)
        config = loradrop.LoRAConfig(r=2, method=loradrop.LoRA())
        loradrop.fit(bert(), ROWS, None, config, args=args)
        return capsys.readouterr().err

    assert "main" in printed()
    assert printed(disable_tqdm=True) == ""


# ---- What is no adapter ------------------------------------------------------------------------


def test_a_repository_of_the_hub_is_no_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"snapshot_download\('someone/adapter'\)"):
        loradrop.load(llama(), "someone/adapter")


def test_the_tensors_of_a_checkpoint_say_how_they_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = injected()
    state = {k: v.clone() for k, v in model.state_dict().items() if "lora_bank" in k}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises((OSError, ValueError), match=r"load_state_dict\(.*strict=False"):
            loradrop.load(bert(), path)
    found = injected(seed=1)
    found.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(found.lora_bank.B[0], model.lora_bank.B[0])
