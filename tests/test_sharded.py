"""A sharded model is saved and exported as the whole one it is."""

from pathlib import Path

import torch
from models import adapt, llama
from test_distributed import torchrun

import loradrop
from loradrop.formats.peft_file import read


def test_fsdp2_saves_and_exports_whole_tensors(tmp_path: Path) -> None:
    done = torchrun(Path(__file__).with_name("sharded_save.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    whole = torch.load(tmp_path / "whole.pt")
    model, before = llama(), adapt(llama(), r=3, method=loradrop.LoRA())
    bank = loradrop.load(model, tmp_path / "native")
    assert {k for k in whole if "lora_bank" in k or "lm_head" in k}
    for key, tensor in model.state_dict().items():
        if "_extra_state" not in key:
            assert torch.equal(tensor, whole[key]), key
    assert not torch.equal(bank.delta(0), before.lora_bank.delta(0))  # the step was taken
    for i, (A, B) in enumerate(read(tmp_path / "peft").modules.values()):
        torch.testing.assert_close(B @ A, bank.delta(i))
    saved = read(tmp_path / "peft").others
    assert torch.equal(saved["lm_head.weight"], whole["lm_head.weight"])
