"""A model that FSDP2 shards takes a step, is saved and exported; for torchrun: FOLDER.

What is in the folder afterwards is compared with the tensors that all ranks gather.
"""

import sys
from pathlib import Path

import torch
from models import IDS, adapt, llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import loradrop


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = adapt(llama(), r=3, modules_to_save=["lm_head"], method=loradrop.LoRA())
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(hasattr(p, "full_tensor") for p in model.lora_bank.parameters())
    loradrop.save(model, folder / "native")
    loradrop.export(model, folder / "peft")
    assert (folder / "peft" / "adapter_config.json").exists()  # for every rank
    whole = {k: v.full_tensor() for k, v in model.state_dict().items() if hasattr(v, "full_tensor")}
    if torch.distributed.get_rank() == 0:
        torch.save(whole, folder / "whole.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
