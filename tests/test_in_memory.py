"""Adapters for an engine in memory: the tensors of the exported file, and which of them changed."""

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from models import IDS, adapt, bert, llama, outputs, share
from safetensors.torch import load_file

import loradrop
from loradrop import LoRAConfig, adapter_tensors
from loradrop.files import read_json

TARGETS = ["q_proj", "v_proj"]


def model() -> Any:
    """Of four targets, the first has an adapter of its own, and the value projections share one."""
    made = adapt(llama(), r=3, lora_alpha=5, target_modules=TARGETS)
    loradrop.share(made, [made.lora_bank.targets[0].name])
    return share(made, [0])


def test_they_are_the_tensors_of_an_export(tmp_path: Path) -> None:
    made = model()
    loradrop.export(made, tmp_path)
    found = adapter_tensors(made, "vllm")
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert found.config == read_json(tmp_path / "adapter_config.json")
    assert set(found.tensors) == set(written) == set(found.changed) and not found.gone
    assert all(torch.equal(found.tensors[key], value) for key, value in written.items())


@pytest.mark.parametrize("padded", [True, False])
def test_peft_computes_from_them_what_the_model_does(padded: bool) -> None:
    peft = pytest.importorskip("peft")
    made = adapt(bert(layers=2), r=3, lora_alpha=5, target_modules=["query", "value"])
    found = adapter_tensors(made, padded=padded)
    config = peft.LoraConfig(**{k: v for k, v in found.config.items() if k != "peft_type"})
    base = copy.deepcopy(made)
    loradrop.remove(base)
    engine = peft.get_peft_model(base, config)
    loaded = peft.set_peft_model_state_dict(engine, dict(found.tensors))
    assert not loaded.unexpected_keys
    torch.testing.assert_close(outputs(engine.eval()), outputs(made.eval()), rtol=1e-5, atol=1e-5)


def test_on_another_device() -> None:
    """An engine without a GPU: the values are compared across devices."""
    made = model().to("cuda" if torch.cuda.is_available() else "cpu")
    first = adapter_tensors(made)
    found = adapter_tensors(made, device="cpu", since=first)
    assert {tensor.device.type for tensor in found.tensors.values()} == {"cpu"}
    assert found.tensors.keys() == first.tensors.keys() and found.changed == ()


def keys(*targets: str, factors: str = "AB") -> set[str]:
    return {f"base_model.model.{name}.lora_{f}.weight" for name in targets for f in factors}


def test_only_what_changed() -> None:
    """By value: an optimiser's step, a write past the version counters, one of no effect."""
    made = model()
    bank = made.lora_bank
    names = [target.name for target in bank.targets]
    first = adapter_tensors(made)
    again = adapter_tensors(made, since=first)
    assert again.changed == () and again.update == {} and set(again.tensors) == set(first.tensors)
    kept = {key: value.clone() for key, value in first.tensors.items()}

    slot = bank.slots[0]
    optimizer = torch.optim.SGD([bank.B[slot]], lr=0.1)
    made(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    own = adapter_tensors(made, since=first)
    assert set(own.changed) == set(own.update) == keys(names[0], factors="B")

    users = [name for name, s in zip(names, bank.slots, strict=True) if s == bank.slots[1]]
    assert len(users) == 2  # the value projections
    bank.A[bank.slots[1]].data[0, 0] += 1
    shared = adapter_tensors(made, since=own)
    assert set(shared.changed) == keys(*users, factors="A")
    assert all(torch.equal(first.tensors[key], value) for key, value in kept.items())

    coarse = adapter_tensors(made, dtype="bfloat16", since=shared)
    assert set(coarse.changed) == set(shared.tensors)  # of another dtype
    bank.A[slot].data.mul_(1 + 1e-7)
    assert adapter_tensors(made, dtype="bfloat16", since=coarse).changed == ()


def test_what_is_gone() -> None:
    made = model()
    first = adapter_tensors(made, padded=False)
    names = [target.name for target in made.lora_bank.targets]
    loradrop.share(made, names[:1], share="none", after_select="continue")
    now = adapter_tensors(made, padded=False, since=first)
    assert set(now.gone) == keys(*names[1:]) and set(now.tensors) == keys(names[0])
    assert now.changed == ()


def test_an_engine_that_cannot_take_them() -> None:
    made = adapt(bert(layers=2), r=3, target_modules=["query", "value"])
    with pytest.raises(ValueError, match="sglang cannot take this adapter: it silently ignores"):
        adapter_tensors(made, "sglang")
    with pytest.raises(ValueError, match="engine 'tgi' is unknown"):
        adapter_tensors(made, "tgi")
    with pytest.raises(ValueError, match="dtype='int8'"):
        adapter_tensors(made, dtype="int8")


def test_merged_adapters_are_refused() -> None:
    made = adapt(llama(), LoRAConfig(r=3, target_modules=TARGETS))
    loradrop.merge(made, keep_original=True)
    with pytest.raises(ValueError, match=r"merged into the weights.*twice"):
        adapter_tensors(made)


def test_a_head_that_is_offloaded_is_named(tmp_path: Path) -> None:
    """PEFT wants the head of its task in the file, though nothing has trained it."""
    base = llama("ForSequenceClassification")
    head = base.score.weight.detach().clone()
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    made = adapt(base, LoRAConfig(r=3, target_modules=TARGETS, modules_to_save=[]))
    for call in (adapter_tensors, lambda m: loradrop.export(m, tmp_path)):
        with pytest.raises(ValueError, match=r"score\.weight is offloaded.*remove_hook_from"):
            call(made)
    accelerate.hooks.remove_hook_from_module(made, recurse=True)
    assert torch.equal(adapter_tensors(made).tensors["base_model.model.score.weight"], head)
