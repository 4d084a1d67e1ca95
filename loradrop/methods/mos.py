"""MoS, Mixture of Shards (Wang et al., ICLR 2025, arXiv:2410.00938): rows of A and columns of B are
put together from shards of two pools, which the targets of a group have in common.

    A_i = rows, each of `shards` shards of pool_A end to end, those that target i picked for A
    B_i = columns, each of `shards` shards of pool_B, those that target i picked for B

The picks are drawn once and never change. Four things tell the targets apart: each picks a part of
the pool; A and B pick on their own (pair dissociation); a pick is a piece of a vector, K/shards or
N/shards long (vector sharding); and the last `private_rank` rows and columns are of shards that
nobody else may use (shard privatisation). For L targets each pool holds L·equivalent_rank vectors,
so a group costs L·equivalent_rank·(K + N) elements: as much as LoRA at the rank equivalent_rank.

Our reading of the paper and its authors' code: all of that, one pool for each kind of module, picks
without repetition within a target, the Kaiming start of A by the fan-in K of a whole vector, and B
at zero. Ours: a pool for each kind, shape and rank, so that any model has its groups; one private
rank, four shards a vector, and a quarter of the rank for `equivalent_rank`, whose values there
depend on the experiment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from loradrop.bank import AdapterBank, Pair
from loradrop.methods.base import Method
from loradrop.options import check_whole
from loradrop.scores import Target


@dataclass(frozen=True, kw_only=True)
class MoS(Method):
    """The options of MoS; `r` of `LoRAConfig` is the rank of A and B as they are put together. With
    private_rank = equivalent_rank = r it is LoRA.

    shards            of a vector; None is four, or the largest number below that divides K and N
    equivalent_rank   what a target costs, as a rank of LoRA; None is a quarter of `r`, or more
                      where a group is too small to give each target so many different shards
    private_rank      the part of `equivalent_rank` that each target has for itself
    seed              of the picks, which do not depend on any other random state

    Raises ValueError naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "mos"

    shards: int | None = None
    equivalent_rank: int | None = None
    private_rank: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shards", "equivalent_rank"):
            check_whole(name, getattr(self, name), 1, or_none=True)
        check_whole("private_rank", self.private_rank, 0)

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """A `MoSBank`. Raises ValueError for targets that cannot be put together like that."""
        return MoSBank(targets, scaling, likes, self)

    def split(self, target: Target) -> int:
        """How many shards a vector of this target has."""
        sides = target.in_features, target.out_features
        if self.shards is None:
            return next(k for k in (4, 3, 2, 1) if not any(side % k for side in sides))
        for side in sides:
            if side % self.shards:
                raise ValueError(
                    f"shards={self.shards} does not divide the {side} features of {target.name} "
                    f"({sides[0]} -> {sides[1]}): choose a number that does, None, or leave it out "
                    "with exclude_modules"
                )
        return self.shards

    def cost(self, target: Target, members: int) -> int:
        """The `equivalent_rank` of a group of so many targets like this one."""
        r, private = target.r, self.private_rank
        what = f"for {target.name} of rank {r}"
        if private > r:
            raise ValueError(f"private_rank={private} {what}: choose at most {r}, or a larger rank")
        least = private - (private - r) // members  # (least − private)·members >= r − private
        found = self.equivalent_rank or max(least, -(-r // 4))
        if not least <= found <= r:
            raise ValueError(
                f"equivalent_rank={found} {what}: with private_rank={private}, its group of "
                f"{members} needs at least {least} to pick {r - private} ranks without repetition, "
                f"and beyond {r} it costs more than LoRA. Choose {least} to {r}, None, or another "
                "private_rank"
            )
        return found


class MoSBank(AdapterBank):
    """For group g the pools A[g] and B[g] (L·equivalent_rank·shards, K/shards and N/shards), and
    the buffer picks_g (L, 2, r·shards): rows of A[g], and of B[g], for each of its targets.

    places   the group of each target, and its number there
    """

    def __init__(
        self,
        targets: Sequence[Target],
        scaling: Sequence[float],
        likes: Sequence[Tensor],
        method: MoS,
    ) -> None:
        super().__init__(targets, scaling)
        random = torch.Generator().manual_seed(method.seed)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        groups = list(dict.fromkeys(target.group for target in targets))
        seen = [0] * len(groups)
        self.places: list[tuple[int, int]] = []
        for target in targets:
            g = groups.index(target.group)
            self.places.append((g, seen[g]))
            seen[g] += 1
        for g, members in enumerate(seen):
            first = self.places.index((g, 0))
            target, like = targets[first], likes[first]
            K, N, split = target.in_features, target.out_features, method.split(target)
            count = members * method.cost(target, members) * split
            A = like.new_empty(count, K // split)
            self.A.append(nn.init.uniform_(A, -(K**-0.5), K**-0.5))
            self.B.append(like.new_zeros(count, N // split))
            picks = _picks(members, count, target.r * split, method.private_rank * split, random)
            self.register_buffer(f"picks_{g}", picks.to(like.device))

    def factors(self, i: int) -> Pair:
        """A (r, K) and B (N, r), put together from the shards that target i picked."""
        (g, member), target = self.places[i], self.targets[i]
        of_A, of_B = self.get_buffer(f"picks_{g}")[member]
        A = embedding(of_A, self.A[g])  # (r·shards, K/shards)
        B = embedding(of_B, self.B[g])  # (r·shards, N/shards)
        return A.view(target.r, target.in_features), B.view(target.r, target.out_features).T


def _picks(members: int, count: int, wanted: int, private: int, random: torch.Generator) -> Tensor:
    """(members, 2, wanted): first common shards, drawn for A and for B; then one's private ones."""
    common = count - members * private
    rows = []
    for member in range(members):
        own = torch.arange(private) + common + member * private
        for _ in "AB":
            drawn = torch.randperm(common, generator=random)[: wanted - private]
            rows.append(torch.cat((drawn, own)))
    return torch.stack(rows).view(members, 2, wanted)
