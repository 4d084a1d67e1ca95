"""PEFT folders that `load` refuses: it says what in them it cannot, and leaves the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Make, Options, bert, llama
from peft_folders import (
    KEY,
    QKV,
    QUERY,
    QV,
    agree,
    put,
    refused,
    retensor,
    rewrite,
    saved,
    tied,
    trained,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import loradrop
from loradrop.formats.peft_file import CONFIG, PREFIX, TENSORS
from loradrop.formats.peft_options import CHANGES, HARMLESS

pytestmark = pytest.mark.numbers

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


TENSOR_CHANGES: list[tuple[Any, str]] = [
    (_lone(B_KEY), f"{QUERY} has lora_A but no lora_B"),
    (_lone(A_KEY), f"{QUERY} has lora_B but no lora_A"),
    (lambda tensors: tensors.clear(), "has no lora_A and lora_B"),
    (put(A_KEY, lambda t: t * float("nan")), rf"{QUERY}.lora_A.weight is not finite"),
    (put(B_KEY, lambda t: t / 0), rf"{QUERY}.lora_B.weight is not finite"),
    (put(A_KEY, lambda t: t[:, :, None]), r"lora_A \(8, 32, 1\) and lora_B \(32, 8\), not \(r"),
    (put(A_KEY, lambda t: t[:3].clone()), r"lora_A \(3, 32\) and lora_B \(32, 8\), not \(r, K"),
    (put(A_KEY, lambda t: t[:, :9].clone()), rf"another model.*\n  {QUERY}: 9 -> 32 in the file"),
    (put(f"{PREFIX}{QUERY}.lora_diag", lambda _: torch.ones(8)), "lora_diag is neither"),
    (
        put(f"{PREFIX}{QUERY}.lora_A.mine.weight", lambda _: torch.ones(8, 32)),
        r"lora_A\.mine\.weight is neither",
    ),
    (
        put(f"{PREFIX}bert.extra.weight", lambda _: torch.ones(2)),
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


def test_a_tied_tensor_that_peft_trained_apart(tmp_path: Path) -> None:
    options = {"target_modules": QKV, "modules_to_save": ["embed_tokens"]}
    saved(tmp_path, tied, **options)
    refused(r"embed_tokens\.weight is the same tensor as lm_head\.weight.*untie", tmp_path, tied)
    agree(tmp_path, llama)


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


def test_adapters_in_folders_of_their_names(tmp_path: Path) -> None:
    """As PEFT saves all but the one that is called default."""
    model = trained(bert(), "mine", **QV)
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"which is {tmp_path / 'mine'}$"):
        loradrop.load(bert(), tmp_path)
    agree(tmp_path / "mine")
