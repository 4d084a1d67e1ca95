"""`LoraDropConfig` in PEFT: the layers, sharing, several adapters, what is refused."""

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft_models import BATCH, LLAMA, OPTIONS, Q0, Q1, V1, logits, made, peft, shared, twin
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig
from loradrop.command.cli import main
from loradrop.integrations.peft import LoraDropConfig
from loradrop.integrations.peft_layers import Banked
from loradrop.integrations.peft_versions import require_peft
from loradrop.statistics.collector import Collector

MODELS: dict[str, Any] = {
    "llama": (models.llama, {}),
    "rslora": (models.llama, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}),
    "Conv1D": (models.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "alpha": (models.llama, {"alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3}}),
    "layers": (models.llama, {"layers_to_transform": [1]}),
}


@pytest.mark.numbers
@pytest.mark.parametrize("name", list(MODELS))
def test_outputs_and_gradients_are_those_of_peft(name: str) -> None:
    """In float64, with the same factors; those of a shared pair are the sum over its layers."""
    make, options = MODELS[name]
    model = made(make(), **options).double()
    loradrop.share(model, [model.lora_bank.targets[0].name], after_select="continue", init="mean")
    assert name == "layers" or len(model.lora_bank.pairs) < len(model.lora_bank.targets)
    stock = twin(model, make().double(), **options)
    found, expected = model(**BATCH), stock(**BATCH)
    assert torch.allclose(found.logits, expected.logits, rtol=0, atol=1e-11)
    assert not torch.allclose(found.logits, make().double()(**BATCH).logits, rtol=0, atol=1e-3)
    found.loss.backward()
    expected.loss.backward()
    bank = model.lora_bank
    sums = [[torch.zeros_like(f) for f in pair.factors()] for pair in bank.pairs]
    for target, slot in zip(bank.targets, bank.slots, strict=True):
        layer = stock.get_base_model().get_submodule(target.name)
        for total, factor in zip(sums[slot], (layer.lora_A, layer.lora_B), strict=True):
            total += factor["default"].weight.grad
    for pair, total in zip(bank.pairs, sums, strict=True):
        for factor, gradient in zip(pair.factors(), total, strict=True):
            assert gradient.abs().max() > 1e-6
            assert torch.allclose(factor.grad, gradient, rtol=0, atol=1e-11)


def test_it_begins_as_the_base_model_and_trains_the_bank_alone() -> None:
    base = logits(models.llama())
    model = peft.get_peft_model(models.llama(), LoraDropConfig(**LLAMA))
    assert torch.allclose(logits(model), base, rtol=0, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    pairs = "base_model.lora_banks.default.pairs"
    assert trained == {f"{pairs}.{k}.{side}" for k in range(4) for side in "AB"}
    assert model.get_nb_trainable_parameters()[0] == model.lora_bank.trainable == 896
    loradrop.share(model, [Q0])
    assert model.get_nb_trainable_parameters()[0] == model.lora_bank.trainable == 704


def test_a_base_without_a_configuration() -> None:
    options = {"target_modules": ["0"], "r": 4, "revision": "main"}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraDropConfig(**options))
    assert model(torch.ones(2, 8)).shape == (2, 8) and model.lora_bank.trainable == 64


def test_its_folder_has_a_plan_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made()
    loradrop.share(model, [Q0])
    model.save_pretrained(tmp_path)
    assert main(["plan", "show", str(tmp_path)]) == 0
    assert f"= {model.lora_bank.trainable:,}" in capsys.readouterr().out


def test_what_it_probes_is_what_an_injected_model_probes() -> None:
    model = made()
    own = models.llama()
    loradrop.inject(own, LoRAConfig(**OPTIONS))
    own.lora_bank.load_state_dict(model.lora_bank.state_dict())
    before = [(name, type(m)) for name, m in model.named_modules()]
    found, expected = (loradrop.probe(m, [BATCH, BATCH], gram=True) for m in (model, own))
    assert dict(found) == pytest.approx(dict(expected), rel=1e-9) and min(found.values()) > 0
    assert found.grams is not None
    assert [(name, type(m)) for name, m in model.named_modules()] == before
    assert loradrop.select(found, keep=1) == loradrop.select(expected, keep=1)
    loradrop.share(model)  # by the options of its configuration: half of LoRA's parameters
    assert model.lora_bank.trainable <= 448


@pytest.mark.parametrize(
    ("make", "task", "targets"),
    [(models.t5, "SEQ_2_SEQ_LM", ["q", "v"]), (models.llama, None, ["q_proj", "v_proj"])],
)
def test_statistics_of_training(make: Any, task: str | None, targets: list[str]) -> None:
    """Of the passes themselves, with the masks of both sides, or with one that has no name."""
    ids, real = models.IDS[:, :6].clone(), torch.ones(3, 6, dtype=torch.long)
    real[0, 4:], other = 0, real.flip(0)
    batch = {"input_ids": ids, "attention_mask": real}
    if task is not None:
        batch |= {"labels": ids, "decoder_attention_mask": other}
    model = made(make(), target_modules=targets, task_type=task).double()
    own = make()
    loradrop.inject(own, LoRAConfig(**OPTIONS | {"target_modules": targets}))
    own.double().lora_bank.load_state_dict(model.lora_bank.state_dict())
    found = []
    for each in (model, own):
        collector = Collector(each, each.lora_bank, online=True)
        out = each(**batch) if task is not None else each(ids, real)
        out.logits.sum().backward()
        collector.close_row()
        collector.detach()
        found.append(collector.scores())
    assert dict(found[0]) == pytest.approx(dict(found[1]), rel=1e-9)
    assert found[0].tokens == found[1].tokens == 16 and min(found[0].values()) > 0


def test_several_adapters() -> None:
    model, base = shared(), logits(models.llama())
    one = logits(model)
    model.add_adapter("second", LoraDropConfig(**LLAMA, plan=[V1]))
    assert torch.equal(logits(model), one)
    model.set_adapter("second")
    assert {p.requires_grad for p in model.lora_bank.parameters()} == {True}
    assert {p.requires_grad for p in model.base_model.lora_banks["default"].parameters()} == {False}
    models.wake(model, 0.2)
    two = logits(model)
    assert model.lora_bank.slots == (0, 1, 0, 2) and not torch.allclose(one, two, atol=1e-3)
    with model.disable_adapter():
        assert torch.allclose(logits(model), base, rtol=0, atol=1e-5)
    assert torch.equal(logits(model), two)
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    model.eval()
    with torch.no_grad():
        mixed = model(input_ids=models.IDS, adapter_names=["default", "second", "__base__"]).logits
    for row, expected in enumerate((one, two, base)):
        assert torch.allclose(mixed[row], expected[row], rtol=0, atol=1e-4)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"active are \['default', 'second'\]: call model.set_ad"):
        loradrop.probe(model, [BATCH])
    both = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), both, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), both, rtol=0, atol=1e-4)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert list(model.base_model.lora_banks) == ["second"]
    assert torch.allclose(logits(model), two, rtol=0, atol=1e-4)  # it was merged in between
    whole = model.merge_and_unload()
    assert not any("lora" in name for name, _ in whole.named_modules())
    assert torch.allclose(logits(whole), two, rtol=0, atol=1e-4)


def test_a_combination_has_an_adapter_in_every_layer(tmp_path: Path) -> None:
    model = shared()
    model.add_adapter("second", LoraDropConfig(**LLAMA, plan=[V1]))
    model.set_adapter("second")
    models.wake(model, 0.2)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert torch.allclose(logits(model), both, rtol=0, atol=1e-4)
    assert model.lora_bank.slots == (0, 1, 2, 3) and model.lora_bank.targets[0].r == 8
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "sum")
    assert torch.allclose(logits(again), both, rtol=0, atol=1e-4)
    assert model.peft_config["default"].plan is None


def test_two_active_adapters_add_up_as_in_peft() -> None:
    model = made(lora_alpha=4).double()
    stock = twin(model, models.llama().double(), lora_alpha=4)
    model.add_adapter("second", LoraDropConfig(**LLAMA))
    model.double().set_adapter("second")
    models.wake(model, 0.2)
    single = twin(model, models.llama().double())
    stock.add_adapter("second", peft.LoraConfig(**LLAMA))
    stock.double()
    for key, layer in single.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            other = stock.get_base_model().get_submodule(key)
            other.lora_A["second"], other.lora_B["second"] = (
                layer.lora_A["default"], layer.lora_B["default"],
            )  # fmt: skip
    for each in (model, stock):
        each.base_model.set_adapter(["default", "second"])
    assert torch.allclose(logits(model), logits(stock), rtol=0, atol=1e-11)


def test_unload_gives_the_base_back() -> None:
    base = models.llama()
    before = models.snapshot(base)
    model = shared(model=base)
    model.unload()
    before["requires_grad"] = dict.fromkeys(before["requires_grad"], False)
    models.assert_same(base, before)


def test_how_adapters_start() -> None:
    options = LLAMA | {"r": 16, "target_modules": ["q_proj"]}
    for init, spread in ((True, 1 / 32**0.5 / 3**0.5), ("gaussian", 1 / 16), (False, None)):
        model = peft.get_peft_model(
            models.llama(), LoraDropConfig(**options, init_lora_weights=init)
        )
        A, B = (
            torch.cat([f.flatten() for f in side])
            for side in (model.lora_bank.A, model.lora_bank.B)
        )
        if spread is None:
            assert B.abs().max() <= 1 / 16**0.5 and B.std() > 0.1
        else:
            assert not B.any() and float(A.detach().std()) == pytest.approx(spread, rel=0.15)


def test_targets_without_an_adapter() -> None:
    model = made()
    loradrop.share(model, [Q0, V1], share="none")
    models.wake(model, 0.1)
    layer = model.get_base_model().get_submodule(Q1)
    assert model.lora_bank.trainable == 256 + 192 and list(layer.lora_A.keys()) == []
    found = logits(model)
    own = copy.deepcopy(model)
    assert torch.allclose(logits(own.merge_and_unload()), found, rtol=0, atol=1e-4)
    model.add_adapter("second", LoraDropConfig(**LLAMA))
    model.delete_adapter("default")
    assert list(layer.lora_A.keys()) == ["second"]


def test_checkpointing_dropout_and_copies() -> None:
    model = made(lora_dropout=0.25).train()
    model.enable_input_require_grads()

    def gradients(each: Any) -> list[Tensor]:
        torch.manual_seed(3)
        each.zero_grad()
        each(**BATCH).loss.backward()
        return [p.grad.clone() for p in each.lora_bank.parameters()]

    plain = gradients(model)
    double = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    for other in (gradients(model), gradients(double)):
        for a, b in zip(plain, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    for p in double.lora_bank.parameters():
        p.data.zero_()
    assert all(p.any() for p in model.lora_bank.parameters())


def test_a_layer_compiles_to_one_graph() -> None:
    model = made().double()
    layer = model.get_base_model().get_submodule(V1)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 32, dtype=torch.float64)
    first = compiled(x)
    assert torch.allclose(first, layer(x), rtol=0, atol=1e-11)
    loradrop.share(model, [Q0])
    models.wake(model, 0.2)
    assert torch.allclose(compiled(x), layer(x), rtol=0, atol=1e-11)
    assert not torch.allclose(layer(x), first, rtol=0, atol=1e-3)


def test_hooks_of_a_base_layer_are_called() -> None:
    model, seen = made(), []
    layer = model.get_base_model().get_submodule(Q0)
    expected = logits(model)
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5) and seen == [1]


def quantised(kind: str, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    if kind == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        how = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        how = transformers.BitsAndBytesConfig(**{f"load_in_{kind}": True})
    return type(models.llama()).from_pretrained(folder, quantization_config=how, device_map="cpu")


@pytest.mark.parametrize("kind", ["4bit", "8bit", "torchao"])
def test_quantised_bases(kind: str, tmp_path: Path) -> None:
    """What PEFT computes over them, and merges into them."""
    models.llama().save_pretrained(tmp_path)
    model = made(quantised(kind, tmp_path))
    loradrop.share(model, [Q0], init="mean", after_select="continue")
    models.wake(model, 0.1)
    base, stock = quantised(kind, tmp_path), twin(model, quantised(kind, tmp_path))
    found, expected = model(**BATCH), stock(**BATCH)
    moved = float((found.logits - base(**BATCH).logits).detach().abs().max())
    bound = 0.05 * moved  # where an input is rounded to 8 bits, one that is between two goes astray
    assert (found.logits - expected.logits).abs().max() < bound and moved > 0.1
    found.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.lora_bank.parameters())
    assert len(loradrop.probe(model, [BATCH])) == 4
    assert loradrop.accelerate_peft(stock) == 4
    assert (stock(**BATCH).logits - expected.logits).abs().max() < bound
    both = model.merge_and_unload(), stock.merge_and_unload()
    assert torch.allclose(logits(both[0]), logits(both[1]), rtol=0, atol=bound)


def test_the_scale_is_peft_s() -> None:
    model = made()
    half = copy.deepcopy(model)
    for p in half.lora_bank.B:
        p.data.mul_(0.5)
    for module in model.modules():
        if isinstance(module, Banked):
            module.set_scale("default", 0.5)
    assert torch.allclose(logits(model), logits(half), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "does not serve use_dora=True: DoRA"),
        ({"lora_bias": True}, "does not serve lora_bias=True"),
        ({"target_parameters": ["a.b"]}, "does not serve target_parameters"),
        ({"layer_replication": [[0, 1]]}, "does not serve layer_replication"),
        ({"trainable_token_indices": [1]}, "does not serve trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "does not serve alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "does not serve init_lora_weights='pissa'"),
        ({"ensure_weight_tying": True}, "does not serve ensure_weight_tying"),
        ({"budget": 0.5, "threshold": 0.9}, "give one of threshold and budget"),
        ({"share": "all"}, "share='all': choose one of"),
        ({"plan": 3}, "plan=3: give the path"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LoraDropConfig(**LLAMA, **options)


def test_what_a_model_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embed_tokens is a Embedding, and LoraDropConfig serves"):
        made(target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"a rank beyond 16 adds nothing"):
        made(r=20)
    with pytest.raises(ValueError, match="adapter_name='A'"):
        peft.get_peft_model(models.llama(), LoraDropConfig(**LLAMA), adapter_name="A")
    model = made()
    with pytest.raises(ValueError, match="a rank beyond 16 adds nothing"):
        model.add_adapter("wide", LoraDropConfig(**(LLAMA | {"r": 20})))
    assert list(model.peft_config) == ["default"] and torch.isfinite(logits(model)).all()
    for verb, instead in (
        (loradrop.merge, "merge_and_unload"), (loradrop.remove, "unload"),
        (lambda m: loradrop.truncate(m, {}), "loradrop.load the folder"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=instead):
            verb(model)
    with pytest.raises(ValueError, match="disable_adapter"), loradrop.disabled(model):
        pass
    with pytest.raises(ValueError, match="LoraDropConfig and accelerate_peft"):
        loradrop.inject(model, LoRAConfig(**OPTIONS))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        loradrop.export(model, tmp_path)
    stock = peft.get_peft_model(models.llama(), peft.LoraConfig(**LLAMA))
    with pytest.raises(ValueError, match=r"give get_peft_model a loradrop.*LoraDropConfig"):
        loradrop.probe(stock, [BATCH])


def test_an_older_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_peft()
    for version in ("0.18.0", "0.20.9.dev0", "0.21.0", "1.0.0.dev0"):
        monkeypatch.setattr("importlib.metadata.version", lambda _, found=version: found)
        if version.startswith(("0.18", "0.20")):
            with pytest.raises(ImportError, match=rf"needs peft>=0.21, and peft {version}"):
                require_peft()
        else:
            require_peft()
    monkeypatch.undo()
    with pytest.raises(ImportError, match="which is not installed: pip install peft"):
        require_peft("no-such-package-as-this")


def test_the_head_of_a_classifier_without_a_task_type(caplog: pytest.LogCaptureFixture) -> None:
    """PEFT would adapt it like any layer: said, with the remedy, by which it is trained whole."""
    options: dict[str, Any] = {"r": 2, "target_modules": "all-linear"}
    peft.get_peft_model(models.bert(), LoraDropConfig(**options))
    assert "classifier is of the head" in caplog.text and 'such as "SEQ_CLS"' in caplog.text
    caplog.clear()
    model = peft.get_peft_model(models.bert(), LoraDropConfig(**options, task_type="SEQ_CLS"))
    assert "of the head" not in caplog.text
    assert not any("classifier" in target.name for target in model.lora_bank.targets)
    assert model.base_model.model.classifier.modules_to_save.default.weight.requires_grad


def test_sharing_while_merged_changes_nothing() -> None:
    model = shared()
    before, base = logits(model), model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    weight = base.weight.clone()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged: call model\.unmerge_adapter"):
        loradrop.share(model, [V1])
    model.unmerge_adapter()
    torch.testing.assert_close(base.weight, weight)
    torch.testing.assert_close(logits(model), before)
    injected = models.adapt(models.llama(), r=4, target_modules=["q_proj"])
    loradrop.merge(injected, keep_original=True)
    with pytest.raises(ValueError, match="the adapters are merged into the weights"):
        loradrop.share(injected, [])


def test_a_copy_of_a_tied_embedding_is_not_loaded_into_both(tmp_path: Path) -> None:
    def base(tied: bool) -> Any:
        model = models.llama(tie_word_embeddings=tied)
        if not tied:
            model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
        return model

    model = made(base(True), modules_to_save=["embed_tokens"], plan=[Q0])
    table = model.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    with torch.no_grad():
        table.add_(0.3)
    loradrop.save(model, tmp_path / "native")
    model.save_pretrained(tmp_path / "peft")
    for name in ("native", "peft"):
        with pytest.raises(ValueError, match=r"is the same tensor as .*untie"):
            loradrop.load(base(True), tmp_path / name)
    loaded = base(False)
    loradrop.load(loaded, tmp_path / "native")
    torch.testing.assert_close(logits(loaded), logits(model))
    own = models.adapt(base(True), r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with torch.no_grad():
        own.model.embed_tokens.weight.add_(0.3)
    loradrop.save(own, tmp_path / "own")  # trained in both places
    again = base(True)
    loradrop.load(again, tmp_path / "own")
    torch.testing.assert_close(logits(again), logits(own))


def test_nothing_to_combine_is_said_before_anything_is_made() -> None:
    model = made()
    loradrop.share(model, [Q0], share="none")
    with pytest.raises(ValueError, match=r"default have no adapter for .*v_proj.*any more"):
        model.add_weighted_adapter(["default"], [1.0], "w", combination_type="linear")
    assert {*model.peft_config} == {"default"}
