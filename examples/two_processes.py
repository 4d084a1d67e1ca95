"""LoRA-drop in two processes, by `fit` or by a Trainer of one's own; two_processes.sh starts it.

    torchrun --nproc_per_node 2 examples/two_processes.py [--with fit|trainer] [--tiny]

Every rank runs this whole file. The first one writes what comes out.
"""

import argparse
import os
from pathlib import Path

import tiny
import torch
from datasets import load_dataset
from torch import distributed
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import loradrop

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="FacebookAI/roberta-base")
parser.add_argument("--data", default="reviews.csv")
parser.add_argument("--out", default="runs/two_processes")
parser.add_argument("--with", dest="way", choices=("fit", "trainer"), default="fit")
parser.add_argument("--tiny", action="store_true", help="a tiny random model and made-up rows")
options = parser.parse_args()
if options.tiny:  # each rank its own copy, so that none waits for another's file
    folder = Path(options.out, "tiny", os.environ.get("RANK", "0"))
    options.model = str(tiny.encoder(folder))
    options.data = str(tiny.reviews(folder / "reviews.csv"))

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
config = loradrop.LoraDropConfig(r=8, lora_alpha=16)
rows = load_dataset("csv", data_files=options.data, split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True), remove_columns="text")
parts = rows.train_test_split(0.2, seed=0)

args = TrainingArguments(
    output_dir=options.out, num_train_epochs=3, learning_rate=1e-3,
    per_device_train_batch_size=8, report_to="none", use_cpu=not torch.cuda.is_available(),
    ddp_find_unused_parameters=True,  # of a Trainer of one's own; `fit` does without
)  # fmt: skip
if options.way == "fit":
    loradrop.fit(
        model, parts["train"], parts["test"], config, args=args, processing_class=tokenizer
    )
else:
    loradrop.inject(model, config)
    trainer = Trainer(
        model, args, train_dataset=parts["train"], processing_class=tokenizer,
        callbacks=[loradrop.LoraDropCallback()],
    )  # fmt: skip
    trainer.train()

loradrop.save(model, Path(options.out, "adapter"))  # all ranks call it, the first one writes
if distributed.is_initialized():
    distributed.destroy_process_group()
