"""PEFT folders: `load` gives a model PEFT's own logits, and all goes on from there."""

import copy
import logging
import re
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from models import IDS, Make, Options, bert, llama, outputs, share, snapshot
from peft_folders import (
    KEY,
    QKV,
    QUERY,
    QV,
    SAME,
    Plain,
    agree,
    as_peft,
    loaded,
    peft,
    put,
    refused,
    retensor,
    rewrite,
    saved,
    tied,
    trained,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import loradrop
from loradrop import LoRA, LoRAConfig, LoraDropConfig
from loradrop.command.adapter_bases import load_base
from loradrop.formats.peft_file import PREFIX, TENSORS
from loradrop.injection import injection_of, plan_of

pytestmark = pytest.mark.numbers

_BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": 1}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48}
_BART |= {"decoder_ffn_dim": 48, "pad_token_id": 0}
PATTERNS = {"rank_pattern": {"value": 11}, "alpha_pattern": {"1.*query": 3, "value": 7}}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (bert, {"lora_alpha": 20}),
        (bert, {"r": 3, "lora_alpha": 5, "use_rslora": True}),
        (bert, {"r": 4, **PATTERNS}),
        (bert, {"r": 4, "use_rslora": True, **PATTERNS}),
        (bert, {"r": 4, "rank_pattern": {"nowhere": 2}, "alpha_pattern": {"nor_here": 2}}),
        (bert, {"target_modules": r".*layer\.[02]\.attention\.self\.(query|key)"}),
        (bert, {"target_modules": "all-linear", "exclude_modules": ["classifier"]}),
        (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        (bert, {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"]}),
        (bert, {"layers_to_transform": [0, 2], "layers_pattern": "layer"}),
        (bert, {"layers_to_transform": 1}),
        (bert, {"task_type": "SEQ_CLS"}),
        (bert, {"modules_to_save": ["classifier", "bert.pooler"]}),
        (models.roberta, {"task_type": "SEQ_CLS"}),  # a head of two layers
        (models.distilbert, {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
        (bert, {"bias": "all"}),
        (bert, {"bias": "all", "task_type": "SEQ_CLS"}),  # the head's biases twice
        (bert, {"bias": "lora_only", "task_type": "SEQ_CLS"}),
        (bert, {"lora_dropout": 0.25}),
        (bert, {"init_lora_weights": "gaussian"}),
        (bert, {"init_lora_weights": "orthogonal"}),
        (bert, {"init_lora_weights": "mica"}),
        (bert, {"init_lora_weights": "eva"}),
        (bert, {"init_lora_weights": False}),
        (llama, {"target_modules": QKV, "r": 4, "task_type": "CAUSAL_LM"}),
        (llama, {"target_modules": QKV, "modules_to_save": ["lm_head", "embed_tokens"]}),
        (models.gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        (Plain, {"target_modules": "(lin)"}),
        (Plain, {"target_modules": ["lin"], "modules_to_save": ["head"]}),
        (Plain, {"target_modules": ["lin"], "modules_to_save": ["head.2", "head.0"]}),
    ],
)
def test_the_logits_are_those_of_peft(make: Make, options: Options, tmp_path: Path) -> None:
    model = agree(saved(tmp_path, make, **options), make)
    config, given = plan_of(model).config, peft.LoraConfig(**{**QV, **options})
    assert config.method == LoRA() and config.use_rslora == given.use_rslora
    assert (config.r, config.lora_alpha) == (given.r, given.lora_alpha)
    assert config.lora_dropout == given.lora_dropout == model.lora_bank.dropout
    again = make()  # the configuration describes what was injected
    loradrop.inject(again, config)
    assert again.lora_bank.targets == model.lora_bank.targets
    assert again.lora_bank.scaling == model.lora_bank.scaling


def test_the_plan_says_what_peft_did(tmp_path: Path) -> None:
    options = {"r": 4, "modules_to_save": ["classifier"], "revision": "v1", **PATTERNS}
    saved(tmp_path, **options)
    model = loaded(rewrite(tmp_path, base_model_name_or_path="someone/a-bert"))
    plan = plan_of(model)
    assert set(plan.config.target_modules) == {"query", "value"}
    assert plan.config.modules_to_save == ("classifier",)
    assert {key: getattr(plan.config, key) for key in PATTERNS} == PATTERNS
    assert plan.slots == tuple(range(6)) and plan.kept is None
    assert plan.parameters == model.lora_bank.trainable
    assert plan.versions == {"peft": peft.__version__}
    named = {key: plan.base[key] for key in ("id", "revision", "class")}
    kind = "BertForSequenceClassification"
    assert named == {"id": "someone/a-bert", "revision": "v1", "class": kind}
    assert {k for k, p in model.named_parameters() if p.requires_grad and "lora" not in k} == {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip


def test_layers_to_transform_become_names(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path, layers_to_transform=[2]))
    names = [KEY.format(2, "query"), KEY.format(2, "value")]
    assert list(plan_of(model).config.target_modules) == names


def test_biases_are_trained_whole(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path, bias="lora_only"))
    biases = {f"{target.name}.bias" for target in model.lora_bank.targets}
    assert set(injection_of(model).originals) == biases and len(biases) == 6
    assert all(model.get_parameter(name).requires_grad for name in biases)
    before = snapshot(bert())["state"]
    loradrop.remove(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("rslora", [False, True])
def test_a_rank_beyond_the_layer(rslora: bool, tmp_path: Path) -> None:
    """Of the classifier's, 32 -> 2: two ranks have the same product as the eight of the file."""
    saved(tmp_path, target_modules="all-linear", lora_alpha=11, use_rslora=rslora)
    model = loaded(tmp_path)
    target = model.lora_bank.targets[model.lora_bank.index("classifier")]
    assert target.r == 2 and {t.r for t in model.lora_bank.targets} == {2, 8}
    torch.testing.assert_close(outputs(model), as_peft(tmp_path), rtol=1e-5, atol=1e-5)
    again = bert()
    loradrop.inject(again, plan_of(model).config)
    assert again.lora_bank.targets == model.lora_bank.targets
    assert again.lora_bank.scaling == model.lora_bank.scaling


def test_an_adapted_head_of_a_language_model(tmp_path: Path) -> None:
    """PEFT writes its base weight too, which is not trained."""
    saved(tmp_path, llama, target_modules=["lm_head", "v_proj"])
    key = f"{PREFIX}lm_head.base_layer.weight"
    assert key in load_file(tmp_path / TENSORS)
    assert not injection_of(agree(tmp_path, llama)).originals
    retensor(tmp_path, put(key, lambda t: t + 1))
    refused(r"lm_head\.weight of the base model is in .*load the base model that", tmp_path, llama)


def test_tied_tensors_that_peft_kept_tied(tmp_path: Path) -> None:
    options = {"target_modules": QKV, "modules_to_save": ["embed_tokens"]}
    saved(tmp_path, tied, **options, ensure_weight_tying=True)
    model = agree(tmp_path, tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_tensors_that_peft_could_not_keep_tied(tmp_path: Path) -> None:
    """Asked to, it warns of a GPT-2 and trains a copy of one."""
    options = {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}
    with pytest.warns(UserWarning, match="no tied modules"):
        saved(tmp_path, models.gpt2, **options, ensure_weight_tying=True)
    with pytest.raises(ValueError, match="untie them first"):
        loradrop.load(models.gpt2(), tmp_path)


def load_as_told(model: Any, adapter: Path) -> None:
    """`load`, which refuses a tied model, once what the refusal says is done."""
    with pytest.raises(ValueError, match="untie them first") as refusal:
        loradrop.load(model, adapter)
    remedy = re.search(r"first \((.*), and of a model of transformers (.*)\)", str(refusal.value))
    assert remedy is not None
    exec("\n".join(remedy.groups()), {"model": model, "copy": copy})
    loradrop.load(model, adapter)


@pytest.mark.parametrize("whole", ["embed_tokens", "lm_head"])
def test_a_base_model_is_untied_where_peft_trained_one_apart(whole: str, tmp_path: Path) -> None:
    """By `load_base`, and by what the refusal of a tied model says."""
    tied().save_pretrained(tmp_path / "base")
    adapter = saved(tmp_path / "adapter", tied, target_modules=QKV, modules_to_save=[whole])
    rewrite(adapter, base_model_name_or_path=str(tmp_path / "base"), task_type="CAUSAL_LM")
    expected = as_peft(adapter, tied)
    base, _ = load_base(adapter)
    loradrop.load(base, adapter)
    torch.testing.assert_close(outputs(base), expected, **SAME)
    by_hand = tied()
    load_as_told(by_hand, adapter)
    torch.testing.assert_close(outputs(by_hand), expected, **SAME)
    again = tmp_path / "again"
    loradrop.export(base, again, base_id=str(tmp_path / "base"))
    torch.testing.assert_close(as_peft(again, tied), expected, **SAME)
    base, _ = load_base(again)
    loradrop.load(base, again)
    torch.testing.assert_close(outputs(base), expected, **SAME)


def masked() -> Any:
    return bert(cls="ForMaskedLM")  # the bias of its decoder has two names


def test_a_tied_bias(tmp_path: Path) -> None:
    agree(saved(tmp_path, masked, bias="all"), masked)


def test_embeddings_that_peft_writes_beside_the_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    model = trained(llama(), target_modules=["v_proj"])
    model.save_pretrained(tmp_path / "same", save_embedding_layers=True)
    assert {PREFIX + name for name in names} <= set(load_file(tmp_path / "same" / TENSORS))
    assert not injection_of(agree(tmp_path / "same", llama)).originals
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with torch.no_grad():  # as rows that a resize made
        model.get_input_embeddings().weight[7:] += 1
    model.save_pretrained(tmp_path / "other", save_embedding_layers=True)
    assert list(injection_of(agree(tmp_path / "other", llama)).originals) == names[:1]
    assert f"{names[0]}: in the file though not in modules_to_save" in caplog.text


def test_what_peft_writes_more_than_once(tmp_path: Path) -> None:
    """Embeddings and a head that are trained whole, as after new tokens."""
    names = ["embed_tokens", "lm_head"]
    model = trained(llama(), target_modules=["v_proj"], modules_to_save=names)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    found = load_file(tmp_path / TENSORS)
    assert any(".modules_to_save." in key for key in found)
    assert any(".original_module." in key for key in found)
    agree(tmp_path, llama)
    key = next(key for key in found if ".modules_to_save." in key)
    save_file(found | {key: found[key] + 1}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match=f"{key} is neither lora_A.weight nor lora_B.weight"):
        agree(tmp_path, llama)


def test_new_tokens(tmp_path: Path) -> None:
    """A vocabulary that was made larger before the adapter was trained, here by its base's name."""
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(rows + 3)
    names = ["embed_tokens", "lm_head"]
    theirs = trained(base, target_modules=["v_proj"], modules_to_save=names, task_type="CAUSAL_LM")
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = load_base(tmp_path / "adapter")
    assert ours.get_input_embeddings().weight.shape[0] == rows + 3
    loradrop.load(ours, tmp_path / "adapter")
    ids = torch.tensor([[3, rows, rows + 2]])
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("whole", [[], ["lm_head"]])
@pytest.mark.parametrize("make", [models.t5, lambda: _bart(), lambda: _marian()])
def test_new_tokens_where_encoder_and_decoder_have_one_table(
    make: Make, whole: list[str], tmp_path: Path
) -> None:
    """PEFT writes the table, since it grew, and its loader copies it into the tied one. A part that
    it trained apart cannot be, and what is said of that can be done.
    """
    make().save_pretrained(tmp_path / "base")
    targets = ["q"] if make is models.t5 else ["q_proj"]

    def larger() -> Any:
        base = type(make()).from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(53)
        return base

    options = {"target_modules": targets, "task_type": "SEQ_2_SEQ_LM", "modules_to_save": whole}
    trained(larger(), **options).save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(larger(), tmp_path / "adapter").eval()
    ours, _ = load_base(tmp_path / "adapter")
    if whole:
        load_as_told(ours, tmp_path / "adapter")
    else:
        loradrop.load(ours, tmp_path / "adapter")
    ids = {"input_ids": (i := torch.tensor([[3, 50, 52]])), "decoder_input_ids": i}
    torch.testing.assert_close(ours(**ids).logits, theirs(**ids).logits)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("how", ["peft", "native"])
def test_new_tokens_and_a_head(how: str, classes: int, tmp_path: Path) -> None:
    """The head is found beside the larger vocabulary, and one of the base's size has its names."""
    names = {0: "bad", 1: "good"}
    base = llama("ForSequenceClassification", id2label=names)
    base.save_pretrained(tmp_path / "base")
    larger = type(base).from_pretrained(
        tmp_path / "base", num_labels=classes, ignore_mismatched_sizes=True
    )
    larger.resize_token_embeddings(53, mean_resizing=False)
    options = {"target_modules": ["v_proj"], "modules_to_save": ["score", "embed_tokens"]}
    if how == "peft":
        trained(larger, **options, task_type="SEQ_CLS").save_pretrained(tmp_path / "adapter")
    else:
        loradrop.save(models.adapt(larger, **options), tmp_path / "adapter")
    found, _ = load_base(tmp_path / "adapter")
    assert found.config.num_labels == classes and found.config.vocab_size == 53
    assert classes != 2 or found.config.id2label == names
    loradrop.load(found, tmp_path / "adapter")
    ids = torch.tensor([[3, 50, 52]])
    torch.testing.assert_close(found(input_ids=ids).logits, larger.eval()(input_ids=ids).logits)


def test_an_adapter_of_another_name(tmp_path: Path) -> None:
    trained(bert(), "mine", **QV).save_pretrained(tmp_path)
    agree(tmp_path / "mine")


NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", NARROW)
def test_a_narrow_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT makes its adapters float32 too."""

    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: t.to(dtype) for key, t in tensors.items()})

    model = agree(retensor(saved(tmp_path, task_type="SEQ_CLS"), narrow))
    A = load_file(tmp_path / TENSORS)[f"{PREFIX}{QUERY}.lora_A.weight"]
    found = model.lora_bank.factors(model.lora_bank.index(QUERY))[0]
    assert A.dtype == dtype and found.dtype == torch.float32 and torch.equal(found, A.float())
    assert model.classifier.weight.dtype == torch.float32


def test_a_pissa_adapter_that_peft_converted(tmp_path: Path) -> None:
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=4, init_lora_weights="pissa", **QV))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1.5)
    start = str(tmp_path / "start")
    path = tmp_path / "plain"
    model.save_pretrained(path, path_initial_model_for_weight_conversion=start)
    agree(path)


def test_loading_draws_no_random_number(tmp_path: Path) -> None:
    saved(tmp_path)
    model = bert()
    loradrop.inject(model, LoRAConfig(**QV, modules_to_save=[]))
    random = torch.get_rng_state()
    loradrop.load(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), random)


# A model that is injected already


def injected(**options: Any) -> Any:
    return models.adapt(bert(), **{**QV, **options})


def test_into_an_injected_model(tmp_path: Path) -> None:
    saved(tmp_path, task_type="SEQ_CLS", lora_alpha=20)
    model = injected(lora_alpha=20)
    bank = loradrop.load(model, tmp_path)
    assert bank is model.lora_bank
    torch.testing.assert_close(outputs(model), as_peft(tmp_path), **SAME)
    model = share(injected(lora_alpha=20), [0])  # the file's own pairs replace shared ones
    loradrop.load(model, tmp_path)
    torch.testing.assert_close(outputs(model), as_peft(tmp_path), **SAME)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: injected(target_modules=["query"]), "adapts other targets than the model"),
        (lambda: injected(r=4), r"another rank \(r or rank_pattern\)"),
        (lambda: injected(lora_alpha=3), r"another scale \(lora_alpha"),
        (lambda: models.adapt(bert(), LoraDropConfig(**QV)), r"another method \(lora, not"),
    ],
)
def test_into_one_that_differs(make: Make, message: str, tmp_path: Path) -> None:
    refused(f"{message}.*loradrop.remove", saved(tmp_path), make)


# What comes afterwards


def test_ours_goes_before_peft_in_one_folder(tmp_path: Path) -> None:
    """It knows who shares."""
    model = share(injected(), [0])
    loradrop.export(model, tmp_path)
    assert loaded(tmp_path).lora_bank.slots == tuple(range(6))
    loradrop.save(model, tmp_path)
    assert loaded(tmp_path).lora_bank.slots == model.lora_bank.slots


def test_an_export_beside_another_native_adapter(tmp_path: Path) -> None:
    """That one would be read instead."""
    model = share(injected(), [0])
    loradrop.save(model, tmp_path)
    loradrop.export(model, tmp_path)  # the same
    models.wake(model)
    with pytest.raises(ValueError, match=r"holds another adapter in loradrop's own format"):
        loradrop.export(model, tmp_path)
    loradrop.save(model, tmp_path)
    loradrop.export(model, tmp_path)


@pytest.mark.parametrize("how", ["own", "group", "none"])
@pytest.mark.parametrize("make", [bert, llama, models.gpt2])
def test_our_export_comes_back(make: Make, how: str, tmp_path: Path) -> None:
    """At r = lora_alpha = 8 no scale is folded, so the factors are the same. What has no adapter
    comes back without one.
    """
    model = models.adapt(make(), r=8)
    if how != "own":
        share(model, [1], how)
    loradrop.save(model, tmp_path / "native")
    loradrop.export(loaded(tmp_path / "native", make), tmp_path / "peft")
    found = loaded(tmp_path / "peft", make)
    assert torch.equal(outputs(found), outputs(model))
    for i in range(len(model.lora_bank.targets)):
        one, two = (m.lora_bank.factors(i) for m in (model, found))
        assert (one is None and two is None) or all(map(torch.equal, one, two))


def test_our_export_of_a_small_layer_comes_back(tmp_path: Path) -> None:
    """It is padded to rank 8, which is more than the layer has, and the zeros are left out."""
    model = models.adapt(Plain(), r=2, lora_alpha=3, target_modules=["lin", "head.2"])
    loradrop.export(model, tmp_path)
    found = agree(tmp_path, Plain)
    assert [target.r for target in found.lora_bank.targets] == [2, 2, 2]
    assert found.lora_bank.scaling == (1.0, 1.0, 1.0)
    again = Plain()
    loradrop.inject(again, plan_of(found).config)
    assert again.lora_bank.targets == found.lora_bank.targets


def test_everything_else_works(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "peft", task_type="SEQ_CLS", lora_alpha=20))
    expected = as_peft(tmp_path / "peft")

    loradrop.save(model, tmp_path / "native")
    again = loaded(tmp_path / "native")
    assert plan_of(again) == plan_of(model)
    torch.testing.assert_close(outputs(again), expected, **SAME)

    loradrop.export(model, tmp_path / "export")
    # The scale is folded into B, which float32 rounds once.
    torch.testing.assert_close(as_peft(tmp_path / "export"), expected, rtol=1e-5, atol=1e-5)

    merged = copy.deepcopy(model)
    loradrop.merge(merged)
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-5)

    scores = loradrop.probe(model, [{"input_ids": IDS}])
    assert min(scores.values_by_target) > 0
    best = max(scores, key=scores.__getitem__)
    loradrop.share(model, [best])
    assert model.lora_bank.assignment.states.count("own") == 1
    loradrop.save(model, tmp_path / "shared")
    found = loaded(tmp_path / "shared")
    assert torch.equal(outputs(found), outputs(model))

    loradrop.remove(model)
    assert torch.equal(outputs(model), outputs(bert()))


def test_training_goes_on(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path, task_type="SEQ_CLS"))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    labels, losses = torch.tensor([0, 1, 1]), []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        assert all(model.get_parameter(name).grad.abs().max() > 0 for name in names)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert {name for name in names if not name.startswith("lora_bank.")} == {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [{}, {"value": 2}])
def test_no_target_makes_a_configuration_of_its_own(
    ranks: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loses the zeros of a padded file; with hundreds of targets that would take minutes."""
    made: list[LoRAConfig] = []
    check = LoRAConfig.__post_init__
    monkeypatch.setattr(LoRAConfig, "__post_init__", lambda self: made.append(self) or check(self))
    counts = []
    for layers in (2, 4):
        loradrop.export(models.adapt(bert(layers), r=4, rank_pattern=ranks), tmp_path)
        made.clear()
        bank = loradrop.load(model := bert(layers), tmp_path)
        assert [t.r for t in bank.targets] == [4, ranks.get("value", 4)] * layers
        assert bool(plan_of(model).config.rank_pattern) == bool(ranks)
        counts.append(len(made))
    assert counts[0] == counts[1]


def _bart() -> Any:
    return models.build("BartForConditionalGeneration", "BartConfig", **_BART)


def _marian() -> Any:
    return models.build("MarianMTModel", "MarianConfig", **_BART)


def _encoder_decoder() -> Any:
    bert_of = transformers.BertConfig(vocab_size=50, hidden_size=32, num_attention_heads=4)
    bert_of.num_hidden_layers, bert_of.intermediate_size = 1, 48
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        bert_of, copy.deepcopy(bert_of)
    )
    return transformers.EncoderDecoderModel(both)


@pytest.mark.parametrize(
    ("make", "task", "said"),
    [
        (lambda: bert(cls="Model"), "FEATURE_EXTRACTION", "FEATURE_EXTRACTION"),
        (_marian, "SEQ_2_SEQ_LM", "SEQ_2_SEQ_LM"),
        # AutoModel loads others for the configurations of these.
        (lambda: models.t5("T5EncoderModel"), None, None),
        (_encoder_decoder, None, None),
        # Others say this task, whose class does not know the model.
        (models.llava, None, "CAUSAL_LM"),
    ],
)
def test_the_base_of_an_adapter_is_of_its_class(
    make: Make, task: str | None, said: str | None, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path / "base")
    model = models.adapt(type(make()).from_pretrained(tmp_path / "base"))
    folder = tmp_path / "adapter"
    loradrop.export(model, folder)
    assert peft.PeftConfig.from_pretrained(folder).task_type == task
    found, _ = load_base(rewrite(folder, task_type=said))
    assert type(found) is type(model)
    bank = loradrop.load(found, folder)
    assert [t.name for t in bank.targets] == [t.name for t in model.lora_bank.targets]


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
def test_the_base_of_an_adapter_without_a_task(auto: str, tmp_path: Path) -> None:
    """PEFT says which class it wrapped; the configuration of the base names another."""
    bert(cls="ForMaskedLM").save_pretrained(tmp_path / "base")
    base = getattr(transformers, auto).from_pretrained(tmp_path / "base")
    whole = {} if auto == "AutoModel" else {"modules_to_save": ["classifier"]}
    options = {"r": 4, "target_modules": ["query"], **whole}
    peft.get_peft_model(base, peft.LoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    found, _ = load_base(tmp_path / "adapter")
    assert type(found) is type(base)
    assert len(loradrop.load(found, tmp_path / "adapter").targets) == 3


def test_names_from_before_transformers_5(tmp_path: Path) -> None:
    """PEFT finds today's, and so does `load`."""
    saved(tmp_path, models.llava, target_modules=r".*language_model.*\.[qv]_proj")
    now, before = (f"{PREFIX}{name}." for name in ("model.language_model", "language_model.model"))

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(now, before)] = tensors.pop(key)

    retensor(tmp_path, rename)
    assert all(key.startswith(before) for key in load_file(tmp_path / TENSORS))
    agree(tmp_path, models.llava)
