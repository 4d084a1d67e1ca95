"""The losses whose gradients a probe looks at: of labels drawn from the model, or of the data's.

With labels that the model draws itself, Σ g gᵀ of the gradients g of many samples is the Fisher
matrix, the curvature of the loss at a trained model (Martens, 2020); with the data's it is only the
empirical one, and costs no draw.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as binary
from torch.nn.functional import cross_entropy

LABELS = ("sampled", "data")
# (outputs of the model, its inputs) -> the loss of each sample, (n,)
LossFn = Callable[[Any, Mapping[str, Any]], Tensor]
Labels = str | LossFn | None


def losses(model: Any, outputs: Any, given: Mapping[str, Any], labels: Labels, seed: int) -> Tensor:
    """The loss of each sample of a batch, (n,); for "data" their mean, n times.

    given   the inputs of the model by name;  seed   of the draw

    Raises ValueError for outputs that `undrawable` names, for logits of classes of which none can
    be drawn, as they are not finite, and for "data" without a loss.
    """
    if callable(labels):
        found = labels(outputs, given)
        if not isinstance(found, Tensor) or found.ndim != 1:
            raise ValueError("labels= must return the loss of each sample, a tensor of one axis")
        return found
    if labels == "data":
        return _of_data(model, outputs, given)
    if (why := undrawable(model, outputs)) is not None:
        raise ValueError(
            f"{why}: pass labels='data' with labels in the batches, labels=None for the output "
            "metric alone, or a function of (outputs, inputs) that gives the loss of each sample"
        )
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    return torch.cat([_drawn(model, v, kind, given, generator) for v in logits_of(outputs)])


def undrawable(model: Any, outputs: Any) -> str | None:
    """Why no labels can be drawn from these outputs; None where they can."""
    name, logits = type(model).__name__, logits_of(outputs)
    if not logits:
        return f"{name} returns no logits to draw labels from"
    for value in logits:
        if value.ndim > 3:  # (B, C, H, W) of images, or (B, S, ..., C)
            return (
                f"{name} returns logits of shape {tuple(value.shape)}, which do not say which of "
                "their axes is that of the classes"
            )
    return None


def logits_of(outputs: Any) -> list[Tensor]:
    """What a model returns by a name that ends in "logits"; a tensor alone is logits."""
    if isinstance(outputs, Tensor):
        return [outputs]
    named = outputs.items() if isinstance(outputs, Mapping) else ()
    return [v for k, v in named if k.endswith("logits") and isinstance(v, Tensor)]


def _of_data(model: Any, outputs: Any, given: Mapping[str, Any]) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if not isinstance(loss, Tensor):
        raise ValueError(
            "labels='data' needs a loss, and the model returned none: put labels into the batches, "
            "or pass a function of (outputs, inputs) that gives the loss of each sample"
        )
    return loss.float().expand(int(samples_of(model, given)))


def _drawn(
    model: Any, logits: Tensor, kind: str | None, given: Mapping[str, Any], random: torch.Generator
) -> Tensor:
    """The losses of labels drawn from the distribution that the logits stand for."""
    logits = logits.float()
    if kind == "multi_label_classification":
        draw = torch.rand(logits.shape, generator=random).to(logits.device)
        label = (draw < logits.detach().sigmoid()).to(logits)
        # The mean of C losses: its curvature is the mean of theirs.
        each: Tensor = binary(logits, label, reduction="none")
        return each.sum(-1) / math.sqrt(logits.shape[-1])
    if kind == "regression" or logits.shape[-1] == 1:  # (p − y)², whose curvature is 2
        noise = torch.randn(logits.shape, generator=random).to(logits.device)
        label = logits.detach() + noise * 0.5**0.5
        each = (logits - label).square()
        return each.sum(-1).flatten() / math.sqrt(logits.shape[-1])
    rows = logits.reshape(-1, logits.shape[-1])
    counts = _counting(model, logits, given)
    if counts is not None:
        rows = rows[counts.reshape(-1)]
    chances = rows.detach().softmax(-1).cpu()
    if not chances.isfinite().all():
        raise ValueError(
            f"{type(model).__name__} returns logits that are not finite, so no labels can be "
            "drawn: its adapters diverged, or its dtype is too narrow. Take an earlier checkpoint, "
            "or measure in float32"
        )
    chosen = torch.multinomial(chances, 1, generator=random)
    return cross_entropy(rows, chosen.squeeze(1).to(rows.device), reduction="none")


def _counting(model: Any, logits: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """Which rows of logits (B, S, C) are samples: those with a label, else the real tokens."""
    if logits.ndim < 3:
        return None
    shape, labels = logits.shape[:-1], given.get("labels")
    if isinstance(labels, Tensor) and labels.shape == shape:
        counts = labels != -100
        if _predicts_next(model):
            return torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], 1)
        return counts
    name = "decoder_attention_mask" if "decoder_attention_mask" in given else "attention_mask"
    mask = given.get(name)
    return mask > 0 if isinstance(mask, Tensor) and mask.shape == shape else None


def _predicts_next(model: Any) -> bool:
    """Whether the logits of a token are compared with the label of the next one."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    kind = getattr(model, "loss_type", None)  # None: transformers takes that of ForCausalLM
    if kind is None:
        return type(model).__name__.endswith(("LMHeadModel", "ForCausalLM"))
    return kind in ("ForCausalLM", "ForConditionalGeneration")


def samples_of(model: Any, given: Mapping[str, Any]) -> Tensor | int:
    """How many losses a model with these inputs takes the mean of: its labels that count, of which
    no token predicts the first of a row where each predicts the next; else the length of the batch.
    """
    labels = given.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim:
        if labels.ndim > 1 and _predicts_next(model):
            labels = labels[:, 1:]
        return (labels != -100).sum()
    first = next((v for v in given.values() if isinstance(v, Tensor) and v.ndim), None)
    return 1 if first is None else len(first)
