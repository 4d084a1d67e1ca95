"""Supervised fine-tuning with TRL: LoRA-drop in an SFTTrainer.

    python examples/sft_trl.py --model meta-llama/Llama-3.2-1B --data answers.jsonl
    python examples/sft_trl.py --tiny             on a CPU, in seconds

The data is a JSONL file of prompts and completions. What is trained is in the checkpoints:
`loradrop export runs/sft/checkpoint-<step> adapter-peft` makes a PEFT folder of one.
"""

import argparse
from pathlib import Path

import tiny
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import loradrop

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="meta-llama/Llama-3.2-1B")
parser.add_argument("--data", default="answers.jsonl")
parser.add_argument("--out", default="runs/sft")
parser.add_argument("--epochs", type=float, default=3.0)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--tiny", action="store_true", help="a tiny random model and made-up rows")
options = parser.parse_args()
if options.tiny:
    options.model = str(tiny.decoder(Path(options.out, "tiny")))
    options.data = str(tiny.answers(Path(options.out, "tiny", "answers.jsonl")))

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model)
rows = load_dataset("json", data_files=options.data, split="train")
loradrop.inject(model, loradrop.LoraDropConfig(r=8, lora_alpha=16, target_modules="all-linear"))

args = SFTConfig(
    output_dir=options.out, num_train_epochs=options.epochs, learning_rate=1e-3,
    per_device_train_batch_size=options.batch, logging_steps=5, report_to="none",
    bf16=torch.cuda.is_available(), gradient_checkpointing=False, dataloader_pin_memory=False,
)  # fmt: skip
trainer = SFTTrainer(
    model, args, train_dataset=rows, processing_class=tokenizer,
    callbacks=[loradrop.LoraDropCallback()],
)  # fmt: skip
trainer.train()
print(trainer.state.log_history[-1])
