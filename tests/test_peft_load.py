"""PEFT folders: `load` gives a model PEFT's own logits, or says what in the folder it cannot."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import IDS, Make, Options, assert_same, bert, llama, outputs, share, snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loradrop
from loradrop import LoRA, LoRAConfig, LoraDropConfig
from loradrop.formats.peft_file import CONFIG, PREFIX, TENSORS
from loradrop.formats.peft_options import CHANGES, HARMLESS
from loradrop.injection import injection_of, plan_of

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.numbers

# Both sides compute in float64 from the same float32 factors, in sums of fewer than 1000 terms.
SAME = {"rtol": 1e-10, "atol": 1e-10}
QV = {"target_modules": ["query", "value"]}
QKV = ["q_proj", "k_proj", "v_proj"]


class Plain(nn.Module):
    """Not a model of transformers: `lin` is also the end of the name `sub.lin`."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.sub = nn.Linear(size, size), nn.Sequential()
        self.sub.add_module("lin", nn.Linear(size, size))
        self.head = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 3))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = nn.functional.one_hot(input_ids % 16, 16).to(self.lin.weight)
        return {"y": self.head(self.sub(torch.tanh(self.lin(x))))}


def trained(base: nn.Module, name: str = "default", **options: Any) -> Any:
    """PEFT's model over `base`, with every tensor that it would train away from its start."""
    model = peft.get_peft_model(base, peft.LoraConfig(**options), adapter_name=name)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            step = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.add_(step.to(parameter.dtype))
    return model


def saved(path: Path, make: Make = bert, **options: Any) -> Path:
    """A folder that PEFT wrote."""
    trained(make(), **{**QV, **options}).save_pretrained(path)
    return path


def loaded(path: Path, make: Make = bert) -> Any:
    """The adapters in `path`, in a fresh model."""
    model = make()
    loradrop.load(model, path)
    return model


def as_peft(path: Path, make: Make = bert) -> Tensor:
    """What PEFT computes from the folder."""
    return outputs(peft.PeftModel.from_pretrained(make(), str(path)).eval())


def agree(path: Path, make: Make = bert) -> Any:
    """The model loaded from the folder, once its outputs are PEFT's and not the base's."""
    model, expected = loaded(path, make), as_peft(path, make)
    torch.testing.assert_close(outputs(model), expected, **SAME)
    assert (outputs(make()) - expected).abs().max() > 1e-2
    return model


def rewrite(path: Path, **changes: Any) -> Path:
    """The folder with other options in its configuration."""
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | changes))
    return path


def retensor(path: Path, change: Any) -> Path:
    """The folder with other tensors: `change` gets them by their keys."""
    tensors = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS, {"format": "pt"})
    return path


def refused(message: str, path: Path, make: Make = bert) -> None:
    """By a ValueError, and the model stays as it is."""
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        loradrop.load(model, path)
    assert_same(model, before)


KEY = "bert.encoder.layer.{}.attention.self.{}"
QUERY = KEY.format(1, "query")
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
    retensor(tmp_path, _put(key, lambda t: t + 1))
    refused(r"lm_head\.weight of the base model is in .*load the base model that", tmp_path, llama)


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


def test_an_adapter_of_another_name(tmp_path: Path) -> None:
    trained(bert(), "mine", **QV).save_pretrained(tmp_path)
    agree(tmp_path / "mine")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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


# What is refused


VARIANTS: list[tuple[Options, str]] = [
    ({"peft_type": "VERA"}, "peft_type='VERA': only LORA is read.*merge_and_unload"),
    ({"use_dora": True}, "use_dora=True is not plain LoRA: DoRA.*merge_and_unload"),
    ({"lora_bias": True}, "lora_bias=True.*B has a bias"),
    ({"alora_invocation_tokens": [3, 4]}, r"alora_invocation_tokens=\[3, 4\]"),
    ({"arrow_config": {"top_k": 2}}, "arrow_config="),
    ({"kasa_config": {"beta": 1e-4}}, "kasa_config="),
    ({"monteclora_config": {"num_samples": 2}}, "monteclora_config="),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora="),
    ({"use_qalora": True}, "use_qalora=True"),
    ({"velora_config": {"num_groups": 2}}, "velora_config="),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication="),
    ({"target_parameters": ["experts.down_proj"]}, "target_parameters="),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model_for_weight_conv"),
    ({"init_lora_weights": "olora"}, "olora.*path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "corda"}, "corda.*path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "lora_ga"}, "lora_ga.*path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "loftq"}, 'loftq.*"init_lora_weights": true'),
    ({"use_next_years_idea": True}, "use_next_years_idea=True, which loradrop does not know"),
    ({"r": 4}, f"{QUERY.replace('1', '0')} has rank 8 in {TENSORS} and rank 4 by r and rank_p"),
    ({"r": "8"}, "r='8': the rank is a whole number"),
    ({"lora_alpha": 0}, "lora_alpha=0: choose a positive number"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0: choose 0"),
    ({"rank_pattern": ["query"]}, f"{CONFIG} is damaged"),
]


@pytest.mark.parametrize(("changes", "message"), VARIANTS)
def test_options_beyond_plain_lora(changes: Options, message: str, tmp_path: Path) -> None:
    refused(message, rewrite(saved(tmp_path), **changes))


def test_every_option_of_peft_is_known(tmp_path: Path) -> None:
    """One that is set and that nobody has looked at is refused, so none is missing here."""
    saved(tmp_path)
    assert set(json.loads((tmp_path / CONFIG).read_text())) <= {*CHANGES, *HARMLESS}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (llama, {"target_modules": ["embed_tokens"]}, "lora_embedding_A is neither"),
        (bert, {**QV, "use_dora": True}, "use_dora=True"),
        (bert, {**QV, "trainable_token_indices": {"word_embeddings": [1]}}, "trainable_token_ind"),
        (
            llama,
            {"target_modules": [], "target_parameters": ["q_proj.weight"]},
            "target_parameters",
        ),
        (bert, {**QV, "lora_bias": True}, "lora_bias=True"),
    ],
)
def test_variants_that_peft_wrote(
    make: Make, options: Options, message: str, tmp_path: Path
) -> None:
    trained(make(), **options).save_pretrained(tmp_path)
    refused(message, tmp_path, make)


A_KEY, B_KEY = (f"{PREFIX}{QUERY}.lora_{side}.weight" for side in "AB")


def _lone(key: str) -> Any:
    return lambda tensors: tensors.pop(key)


def _put(key: str, value: Any) -> Any:
    return lambda tensors: tensors.update({key: value(tensors.get(key))})


TENSOR_CHANGES: list[tuple[Any, str]] = [
    (_lone(B_KEY), f"{QUERY} has lora_A but no lora_B"),
    (_lone(A_KEY), f"{QUERY} has lora_B but no lora_A"),
    (lambda tensors: tensors.clear(), "has no lora_A and lora_B"),
    (_put(A_KEY, lambda t: t * float("nan")), rf"{QUERY}.lora_A.weight is not finite"),
    (_put(B_KEY, lambda t: t / 0), rf"{QUERY}.lora_B.weight is not finite"),
    (_put(A_KEY, lambda t: t[:, :, None]), r"lora_A \(8, 32, 1\) and lora_B \(32, 8\), not \(r"),
    (_put(A_KEY, lambda t: t[:3].clone()), r"lora_A \(3, 32\) and lora_B \(32, 8\), not \(r, K"),
    (_put(A_KEY, lambda t: t[:, :9].clone()), rf"another model.*\n  {QUERY}: 9 -> 32 in the file"),
    (_put(f"{PREFIX}{QUERY}.lora_diag", lambda _: torch.ones(8)), "lora_diag is neither"),
    (
        _put(f"{PREFIX}{QUERY}.lora_A.mine.weight", lambda _: torch.ones(8, 32)),
        r"lora_A\.mine\.weight is neither",
    ),
    (
        _put(f"{PREFIX}bert.extra.weight", lambda _: torch.ones(2)),
        r"another model.*\n  bert.extra.weight: \(2,\) in the file, not there in the model",
    ),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_CHANGES)
def test_tensors_that_are_no_plain_pairs(change: Any, message: str, tmp_path: Path) -> None:
    refused(message, retensor(saved(tmp_path), change))


def test_another_model(tmp_path: Path) -> None:
    rewrite(saved(tmp_path), base_model_name_or_path="someone/a-bert")
    message = rf"another model \(someone/a-bert\).*\n  {KEY.format(2, 'query')}: 32 -> 32 in the f"
    refused(message, tmp_path, lambda: bert(layers=2))
    refused(rf"{QUERY}: 32 -> 32 in the file, 16 -> 16 in", tmp_path, lambda: bert(hidden=16))
    refused("not there in the model", tmp_path, llama)


def test_a_head_of_another_size(tmp_path: Path) -> None:
    saved(tmp_path, lambda: bert(num_labels=5), task_type="SEQ_CLS")
    refused(r"classifier.weight: \(5, 32\) in the file, \(2, 32\) in the model", tmp_path)
    refused(r"not there in the model", tmp_path, lambda: bert(cls="Model"))


def test_a_head_that_lacks_a_tensor(tmp_path: Path) -> None:
    retensor(saved(tmp_path, task_type="SEQ_CLS"), _lone(f"{PREFIX}classifier.bias"))
    refused(r"modules_to_save=.*without classifier\.bias in", tmp_path)


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def test_a_tied_tensor_that_peft_trained_apart(tmp_path: Path) -> None:
    options = {"target_modules": QKV, "modules_to_save": ["embed_tokens"]}
    saved(tmp_path, tied, **options)
    refused(r"embed_tokens\.weight is the same tensor as lm_head\.weight.*untie", tmp_path, tied)
    agree(tmp_path, llama)


def test_tied_tensors_that_peft_kept_tied(tmp_path: Path) -> None:
    options = {"target_modules": QKV, "modules_to_save": ["embed_tokens"]}
    saved(tmp_path, tied, **options, ensure_weight_tying=True)
    model = agree(tmp_path, tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def masked() -> Any:
    return bert(cls="ForMaskedLM")  # the bias of its decoder has two names


def test_a_tied_bias(tmp_path: Path) -> None:
    agree(saved(tmp_path, masked, bias="all"), masked)


def test_a_target_that_is_trained_whole_too(tmp_path: Path) -> None:
    rewrite(saved(tmp_path), modules_to_save=["1.attention.self.query"])
    state = bert().state_dict()

    def add(tensors: dict[str, Tensor]) -> None:
        tensors.update({f"{PREFIX}{QUERY}.{n}": state[f"{QUERY}.{n}"] for n in ("weight", "bias")})

    refused(rf"{QUERY} has a pair, and its weight is trained whole too", retensor(tmp_path, add))


def test_a_tied_target(tmp_path: Path) -> None:
    saved(tmp_path, tied, target_modules=["lm_head"])
    refused("'lm_head' is tied to the embedding", tmp_path, tied)


def test_a_target_that_cannot_be_adapted(tmp_path: Path) -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

    saved(tmp_path, Conv, target_modules=["conv"])
    refused(r"conv has lora_A \(8, 4, 3, 3\).*only linear layers", tmp_path, Conv)


def test_a_pickle(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
    agree(tmp_path)  # the safetensors file is what is read
    (tmp_path / TENSORS).unlink()
    refused(r"adapter_model\.bin is a pickle, which can run any code.*refused", tmp_path)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_damaged_or_missing_file(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    refused(f"{name} is damaged", tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        loradrop.load(bert(), tmp_path)


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
