"""Two ranks train, save and load a model that FSDP2 shards: FOLDER. Run by torchrun."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from typing import Any

import torch
import training_runs as tiny
from safetensors.torch import load_file
from sharded_checkpoint import gone_on
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchrun import leave

import loradrop
from loradrop.methods import Method
from loradrop.methods.mos import MoS
from loradrop.methods.nb_lora import NBLoRA
from loradrop.methods.vera import VeRA
from loradrop.ranks import full_tensor, is_sharded


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    rows = tiny.make_rows(8, seed)
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def made(shared: bool, method: Method | None = None) -> Any:
    model = tiny.make_model().eval()  # no dropout, whose draws would differ between ranks
    torch.manual_seed(0)
    loradrop.inject(model, replace(tiny.PLAIN, method=method or tiny.PLAIN.method))
    if shared:
        loradrop.share(model, [model.lora_bank.targets[0].name])
    return model


def shard(model: Any, **options: Any) -> Any:
    """The model, or a PeftModel of it, by layers."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    for layer in base.bert.encoder.layer:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def sharded(shared: bool) -> Any:
    return shard(made(shared))


def train(model: Any, optimizer: Any = None) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def composed(method: Method, folder: str) -> float:
    """Of a method that makes its factors of what is sharded and what is not: how far the adapter
    that is saved is from that of a model that is not sharded.
    """
    alone, model = made(False, method), made(False, method)
    fully_shard(model)
    for each in (alone, model):
        train(each)
    loradrop.save(model, f"{folder}/{method.name}")
    loradrop.export(model, f"{folder}/{method.name}-peft")
    try:
        loradrop.export(model, f"{folder}/{method.name}-merged", "merged")
        raise AssertionError("a rank that has no whole weights has merged")
    except ValueError as error:  # on every rank, or another would wait for this one
        assert "the weights are sharded" in str(error)
    distributed.barrier()
    again = made(False, method)
    loradrop.load(again, f"{folder}/{method.name}")
    banks = again.lora_bank, alone.lora_bank
    deltas = [[bank.delta(i) for i in range(len(bank.targets))] for bank in banks]
    assert all(delta.abs().max() > 1e-4 for delta in deltas[1])
    return max(float((a - b).abs().max()) for a, b in zip(*deltas, strict=True))


def of_peft(folder: str) -> dict[str, Any]:
    """A PeftModel that shares: what is trained and saved while it is sharded, against one that is
    not.
    """
    import peft
    from peft.utils import get_peft_model_state_dict

    from loradrop.integrations.peft import LoraDropConfig

    def made() -> Any:
        torch.manual_seed(0)
        kept = ["bert.encoder.layer.0.attention.self.query"]
        return peft.get_peft_model(tiny.make_model(), LoraDropConfig(**tiny.LORA, plan=kept)).eval()

    alone, model = made(), made()
    shard(model)
    for each in (alone, model):
        train(each)
    state = {k: full_tensor(v) for k, v in model.state_dict().items()}
    if distributed.get_rank() == 0:
        model.save_pretrained(f"{folder}/of-peft", state_dict=state)
    distributed.barrier()
    again = peft.PeftModel.from_pretrained(tiny.make_model(), f"{folder}/of-peft")
    own, found = map(get_peft_model_state_dict, (alone, again))
    written = get_peft_model_state_dict(model, state_dict=state)
    assert own.keys() == found.keys() == written.keys()
    gap, reloaded = (
        max(float((own[k] - other[k]).abs().max()) for k in own) for other in (written, found)
    )
    moved = min(float(B.abs().max()) for B in alone.lora_bank.B)
    every = all(map(is_sharded, model.lora_bank.parameters()))
    return {"gap": gap, "reloaded": reloaded, "moved": moved, "sharded": every}


def mixed() -> dict[str, list[float]]:
    """The losses in bfloat16 after some training, of both ways in docs/distributed.md, before that
    of a base in bfloat16 which is not sharded.
    """
    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    ways: dict[str, Any] = {
        "alone": (torch.bfloat16, "float32", None),
        "policy": (torch.float32, "float32", {"mp_policy": MixedPrecisionPolicy(**half)}),
        "adapters of the base's dtype": (torch.bfloat16, "base", {}),
    }
    losses = {}
    for way, (dtype, of_adapters, options) in ways.items():
        model = tiny.make_model().to(dtype).eval()
        torch.manual_seed(0)
        loradrop.inject(model, replace(tiny.PLAIN, adapter_dtype=of_adapters))
        if options is not None:
            shard(model, **options)
        trained = [p for p in model.parameters() if p.requires_grad]  # while they are sharded
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        before = float(model(**batch()).loss.detach())
        train(model, optimizer)
        losses[way] = [before, float(model(**batch()).loss.detach())]
    return losses


def main(folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    alone = made(shared=True)
    train(alone)
    model = sharded(shared=True)
    train(model)
    loradrop.save(model, f"{folder}/native")
    loradrop.export(model, f"{folder}/peft")
    state = {k: full_tensor(v) for k, v in model.state_dict().items()}
    if distributed.get_rank() == 0:  # as the Trainer saves: alone, of what it gathered
        model.save_pretrained(f"{folder}/checkpoint-3", state_dict=state)
    in_memory = loradrop.adapter_tensors(model).tensors
    distributed.barrier()
    written = load_file(f"{folder}/peft/adapter_model.safetensors")
    assert in_memory.keys() == written.keys()
    assert all(torch.equal(tensor, written[key]) for key, tensor in in_memory.items())
    again = made(shared=False)
    loradrop.load(again, f"{folder}/checkpoint-3")
    for name, tensor in again.lora_bank.named_parameters():
        assert torch.equal(tensor, state[f"lora_bank.{name}"]), name
    again = made(shared=False)
    loradrop.load(again, f"{folder}/native")
    gaps = [
        float((a - b).abs().max())
        for a, b in zip(alone.lora_bank.parameters(), again.lora_bank.parameters(), strict=True)
    ]
    at_once = made(shared=True)
    fully_shard(at_once)
    loradrop.load(at_once, f"{folder}/native")
    with torch.no_grad():
        same = torch.allclose(at_once(**batch()).logits, again(**batch()).logits, atol=1e-6)
    methods = VeRA(), NBLoRA(), MoS(private_rank=0)
    of_methods = {method.name: composed(method, folder) for method in methods}
    in_bfloat16 = mixed()
    face = of_peft(folder) if importlib.util.find_spec("peft") is not None else None
    checkpoint = gone_on(f"{folder}/parts", sharded, train)
    if distributed.get_rank() == 0:
        moved = float(again.lora_bank.B[0].abs().max())
        found = {"gaps": of_methods, "gap": max(gaps), "same": same, "moved": moved, "peft": face}
        found |= {"checkpoint": checkpoint, "mixed": in_bfloat16}
        with open(f"{folder}/found.json", "w") as file:
            json.dump(found, file)
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
    assert os.environ["WORLD_SIZE"] == "2"
    leave()
