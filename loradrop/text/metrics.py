"""The metric of a task, of logits and labels as a Trainer hands them over."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from loradrop.text.examples import TextTask
from loradrop.text.labels import IGNORED

if TYPE_CHECKING:
    from transformers import EvalPrediction


def _correlation(a: Any, b: Any) -> float:
    """Pearson's of two columns; of two one-hot matrices it is Matthews', by Gorodkin (2004)."""
    a, b = a - a.mean(0), b - b.mean(0)
    size = ((a * a).sum() * (b * b).sum()) ** 0.5
    return float((a * b).sum() / size) if size > 0 else 0.0


def _score(metric: str, prediction: "EvalPrediction") -> dict[str, float]:
    output = prediction.predictions
    scores = np.asarray(output[0] if isinstance(output, tuple) else output, dtype=np.float64)
    if metric == "micro_f1":
        chosen, true = scores > 0, np.asarray(prediction.label_ids) > 0
        both, either = (chosen & true).sum(), chosen.sum() + true.sum()
        return {metric: float(2 * both / either) if either else 0.0}
    truth = np.asarray(prediction.label_ids).reshape(-1)
    if metric == "pearson":
        return {metric: _correlation(scores.reshape(-1), truth)}
    guess = scores.argmax(-1).reshape(-1)
    if metric == "accuracy":
        return {metric: float((guess == truth)[truth != IGNORED].mean())}
    classes = np.eye(scores.shape[-1])
    return {metric: _correlation(classes[guess], classes[truth])}


def metric_fn(task: TextTask) -> "Callable[[EvalPrediction], dict[str, float]] | None":
    """Logits and labels -> {task.metric: value}, 0 where one is undefined; None for loss.

    Accuracy is over rows, or over words (token_classification). micro_f1 is F1 of all decisions of
    a multi-label task together, with a class chosen where its probability is above a half.
    Matthews' correlation is Gorodkin's (2004) for any number of classes, the usual one for two.
    """
    return None if task.kind == "causal_lm" else partial(_score, task.metric)
