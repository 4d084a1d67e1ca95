"""VeRA (Kopiczko et al., ICLR 2024, arXiv:2310.11454): one frozen random pair for all targets, and
two trained vectors for each.

    ΔW_i = diag(b_i) · B · diag(d_i) · A

A (r, K) and B (N, r) are drawn once, for the widest target, and never trained; a narrower target
uses their first columns and rows. So a target costs r + N elements where LoRA costs r·(K + N), and
r may exceed K and N: each rank is one more trained number.

From the paper: the equation, and the one frozen random pair, by Kaiming. As in PEFT: b = 0 and
d = 0.1 at the start, and a seed of the pair. Ours: s = 1, that a narrower target has a part of the
pair, and that d goes with B: so A is frozen as it is; the backward pass forms no gradient of it and
keeps no x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair
from loradrop.methods.base import Method
from loradrop.options import check_start
from loradrop.scores import Target


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """The options of VeRA; `r` of `LoRAConfig` is the rank, in the hundreds as a rule. Beyond 256
    the fused kernels do not serve it, and PyTorch's products do.

    d_initial   every element of d at the start; b starts at zero, so the model is unchanged
    seed        of A and B, which are Kaiming-uniform and do not depend on any other random state

    s is 1: `lora_alpha` has no effect. Raises ValueError naming the field, its value and the
    remedy.
    """

    name: ClassVar[str] = "vera"
    rank_limited: ClassVar[bool] = False

    d_initial: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start("d_initial", self.d_initial)

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """A `VeRABank` with s = 1 for every target."""
        return VeRABank(targets, likes, self.d_initial, self.seed)


class VeRABank(AdapterBank):
    """Frozen A (r, max K) and B (max N, r); target i has the vectors d[i] (r_i,), b[i] (N_i,)."""

    A: Tensor
    B: Tensor

    def __init__(
        self, targets: Sequence[Target], likes: Sequence[Tensor], d_initial: float, seed: int
    ) -> None:
        super().__init__(targets, [1.0] * len(targets))
        random = torch.Generator().manual_seed(seed)
        r = max(target.r for target in targets)
        k = max(target.in_features for target in targets)
        n = max(target.out_features for target in targets)
        for name, shape in (("A", (r, k)), ("B", (n, r))):
            drawn = torch.empty(shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(drawn, generator=random)
            self.register_buffer(name, drawn.to(likes[0]))
        self.d = nn.ParameterList(
            nn.Parameter(like.new_full((target.r,), d_initial))
            for target, like in zip(targets, likes, strict=True)
        )
        self.b = nn.ParameterList(
            nn.Parameter(like.new_zeros(target.out_features))
            for target, like in zip(targets, likes, strict=True)
        )

    def factors(self, i: int) -> Pair:
        """(A, diag(b_i)·B·diag(d_i)), cut to the target: A_i (r, K), B_i (N, r), on its device."""
        target, d, b = self.targets[i], self.d[i], self.b[i]
        A = self.A[: target.r, : target.in_features].to(b.device)
        B = self.B[: target.out_features, : target.r].to(b.device)
        return A, b.unsqueeze(1) * B * d
