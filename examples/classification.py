"""Sequence classification with transformers' Trainer: LoRA-drop by two lines and an import.

    python examples/classification.py --model FacebookAI/roberta-base --data reviews.csv
    python examples/classification.py --tiny      on a CPU, in seconds

The data is a CSV file with the columns text and label. What is trained is in the checkpoints:
`loradrop export runs/classification/checkpoint-<step> adapter-peft` makes a PEFT folder of one.
"""

import argparse
from pathlib import Path

import tiny
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

import loradrop

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", default="FacebookAI/roberta-base")
parser.add_argument("--data", default="reviews.csv")
parser.add_argument("--out", default="runs/classification")
parser.add_argument("--epochs", type=float, default=3.0)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--tiny", action="store_true", help="a tiny random model and made-up rows")
options = parser.parse_args()
if options.tiny:
    options.model = str(tiny.encoder(Path(options.out, "tiny")))
    options.data = str(tiny.reviews(Path(options.out, "tiny", "reviews.csv")))

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
loradrop.inject(model, loradrop.LoraDropConfig(r=8, lora_alpha=16, target_modules="all-linear"))

rows = load_dataset("csv", data_files=options.data, split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True), remove_columns="text")
parts = rows.train_test_split(0.2, seed=0)


def accuracy(prediction):
    guess = prediction.predictions.argmax(-1)
    return {"accuracy": float((guess == prediction.label_ids).mean())}


args = TrainingArguments(
    output_dir=options.out, num_train_epochs=options.epochs, learning_rate=1e-3,
    per_device_train_batch_size=options.batch, logging_steps=5, report_to="none",
    dataloader_pin_memory=False,
)  # fmt: skip
trainer = Trainer(
    model, args, train_dataset=parts["train"], eval_dataset=parts["test"],
    processing_class=tokenizer, compute_metrics=accuracy,
    callbacks=[loradrop.LoraDropCallback()],
)  # fmt: skip
trainer.train()
print(trainer.evaluate())
