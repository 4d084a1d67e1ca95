"""The penalty that makes the rows or the columns of a factor orthonormal, for several methods."""

import torch
from torch import nn


@torch.no_grad()
def add_gradient(factor: nn.Parameter, weight: float, columns: bool = False) -> None:
    """Adds to the gradient of `factor`, F (r, m), that of weight·‖FFᵀ − I‖²; of an F (m, r) that of
    weight·‖FᵀF − I‖² with `columns`. Nothing where it has no gradient, as no forward used it.
    """
    if factor.grad is None or not weight:
        return
    F = factor.T if columns else factor
    excess = F @ F.T  # (r, r)
    excess.diagonal().sub_(1.0)
    found = excess @ F  # a quarter of the gradient
    factor.grad.add_(found.T if columns else found, alpha=4.0 * weight)
