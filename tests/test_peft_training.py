"""Training a `LoraDropConfig`: Trainer and TRL, from warm-up to the end.

`test_distributed.py` has it in two processes.
"""

import copy
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training_runs as tiny
from torch import Tensor
from transformers import Trainer, TrainingArguments

import loradrop
from loradrop.injection import plan_of

peft = pytest.importorskip("peft", minversion="0.21")

from loradrop.integrations.peft import LoraDropConfig  # noqa: E402

STEPS, WARM = 14, 4
DROP: dict[str, Any] = {**tiny.LORA, "keep": 1, "probe_steps": WARM}
LLAMA: dict[str, Any] = {
    "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "probe_steps": WARM,
    "task_type": "CAUSAL_LM",
}  # fmt: skip
QUIET: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}


def test_it_trains_as_an_injected_model_does(tmp_path: Path) -> None:
    """In float64 and from the same start: the same scores, decision and adapters at the end."""
    ends = []
    own = tiny.make_model()
    loradrop.inject(own, loradrop.LoraDropConfig(**DROP))
    model = peft.get_peft_model(tiny.make_model(), LoraDropConfig(**DROP, task_type="SEQ_CLS"))
    model.lora_bank.load_state_dict(own.lora_bank.state_dict())
    for name, each in (("own", own.double()), ("peft", model.double())):
        args = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=STEPS, learning_rate=1e-2,
            per_device_train_batch_size=8, save_strategy="no", warmup_steps=2, **QUIET,
        )  # fmt: skip
        rows, callbacks = tiny.make_rows(), [loradrop.LoraDropCallback()]
        Trainer(each, args, train_dataset=rows, callbacks=callbacks).train()
        ends.append((plan_of(each), each.lora_bank.state_dict()))
    (one, adapters), (two, others) = ends
    assert one.kept == two.kept and len(one.kept or ()) == 1 and one.slots == two.slots
    assert one.scores is not None and two.scores is not None
    assert one.scores["values"] == pytest.approx(two.scores["values"], rel=1e-9)
    assert one.base["fingerprint"] == two.base["fingerprint"]
    for key, value in adapters.items():
        assert torch.allclose(value.double(), others[key].double(), rtol=0, atol=1e-9), key
    assert all(B.abs().max() > 1e-3 for B in model.lora_bank.B)


def test_what_needs_runs_of_its_own_is_said_at_the_start(tmp_path: Path) -> None:
    config = LoraDropConfig(**DROP, task_type="SEQ_CLS", sample_ratio=0.5)
    model = peft.get_peft_model(tiny.make_model(), config)
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=STEPS, **QUIET)
    rows, callbacks = tiny.make_rows(), [loradrop.LoraDropCallback()]
    with pytest.raises(ValueError, match=r"sample_ratio below 1.*with a new Trainer; or give"):
        Trainer(model, args, train_dataset=rows, callbacks=callbacks).train()


def state(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.lora_bank.state_dict().items()}


def test_in_trl(tmp_path: Path) -> None:
    """`peft_config=` in an SFTTrainer: saved, resumed on either side of the boundary to the same
    end, and the best step loaded.
    """
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"input_ids": [3 + i % 7, 5, 6, 8 + i % 5, 9][: 3 + i % 3]} for i in range(48)]
    data = datasets.Dataset.from_list(rows)

    def run(resume: str | None = None) -> Any:
        args = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=STEPS, save_steps=2, bf16=False,
            per_device_train_batch_size=4, learning_rate=1e-2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, save_total_limit=9, **QUIET,
        )  # fmt: skip
        found = trl.SFTTrainer(
            models.llama(), args, train_dataset=data, eval_dataset=data.select(range(8)),
            processing_class=models.words(), callbacks=[loradrop.LoraDropCallback()],
            peft_config=LoraDropConfig(**LLAMA, lora_dropout=0.1),
        )  # fmt: skip
        found.train(resume_from_checkpoint=resume)
        return found

    whole = run()
    model = whole.model
    plan = plan_of(model)
    assert plan.warmup is not None and plan.warmup["steps"] == WARM and plan.assignment.shares
    best = whole.state.best_global_step
    assert best > WARM
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / f"checkpoint-{best}")
    assert tiny.equal(state(again), state(model))
    ids = {"input_ids": models.IDS}
    assert torch.allclose(again(**ids).logits, model.eval()(**ids).logits, rtol=0, atol=1e-5)
    for step in (2, 8):
        assert tiny.equal(state(run(str(tmp_path / f"checkpoint-{step}")).model), state(model))
    saved = json.loads((tmp_path / "checkpoint-14" / "adapter_config.json").read_text())
    assert saved["plan"]["warmup"]["steps"] == WARM and saved["peft_type"] == "LORADROP"


def test_a_reference_adapter_copies_the_sharing() -> None:
    """As TRL's GRPOTrainer makes one: the same configuration, and tensors by their names."""
    model = peft.get_peft_model(models.llama(), LoraDropConfig(**LLAMA))
    loradrop.share(model, [model.lora_bank.targets[3].name])
    models.wake(model, 0.1)
    ids = {"input_ids": models.IDS}
    expected = model(**ids).logits
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(model(**ids).logits, expected)


def test_a_second_adapter_with_the_same_configuration_is_told_what_it_takes_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = peft.get_peft_model(models.llama(), LoraDropConfig(**LLAMA))
    model.add_adapter("early", model.peft_config["default"])
    loradrop.share(model, [])
    model.add_adapter("copy", copy.copy(model.peft_config["default"]))
    assert "shares as" not in caplog.text and not model.injections["copy"].plan
    model.add_adapter("same", model.peft_config["default"])
    assert "the adapter 'same' shares as 'default' does, whose configuration it has" in caplog.text


def test_fit_says_who_trains_it(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny.make_model(), LoraDropConfig(**DROP, task_type="SEQ_CLS"))
    for config in (None, loradrop.LoraDropConfig(**DROP)):
        with pytest.raises(ValueError, match=r"PEFT's layers: give it to a Trainer with callbacks"):
            loradrop.fit(model, tiny.make_rows(), None, config, output_dir=tmp_path)


def test_dpo_compares_with_the_base_model(tmp_path: Path) -> None:
    """Its reference are the disabled adapters: at the start nothing is preferred, later something
    is.
    """
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": "3 4", "chosen": f"{5 + i % 7} 6", "rejected": "9 8"} for i in range(16)]
    args = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2,
        save_strategy="no", logging_steps=1, bf16=False, warmup_steps=0, **QUIET,
    )  # fmt: skip
    found = trl.DPOTrainer(
        models.llama(), args=args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=models.words(), callbacks=[loradrop.LoraDropCallback()],
        peft_config=LoraDropConfig(**(LLAMA | {"probe_steps": 2})),
    )  # fmt: skip
    found.train()
    margins = [entry["rewards/margins"] for entry in found.state.log_history if "loss" in entry]
    assert abs(margins[0]) < 1e-6 and max(map(abs, margins[1:])) > 1e-4
    assert found.model.lora_bank.assignment.shares
