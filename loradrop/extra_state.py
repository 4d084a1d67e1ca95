"""Who uses which adapter, as one tensor in a state dict: how it is written, and how it is read.

Its rows, int64 (4, targets): slots, -1 for none; 1 for kept, 0 for not, -1 before a decision; a
checksum of the name and the composition; `ALONE` where the state dict that it is in lacks the base
model on purpose, `MERGED` where its weights hold the adapters, 0 else.
"""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from loradrop.scores import Assignment

STATE = "_extra_state"  # torch's name for what get_extra_state gives
ALONE, MERGED = 1, 2


def written(assignment: Assignment, composition: Mapping[str, object], merged: bool) -> Tensor:
    """The tensor of an assignment whose bank composes with these options."""
    given = {n: v * 1.0 if isinstance(v, int) else v for n, v in composition.items()}
    options = str(given) if given else ""
    names, kept = [target.name for target in assignment.targets], assignment.kept
    return torch.tensor(
        [
            [-1 if slot is None else slot for slot in assignment.slots],
            [-1 if kept is None else int(name in kept) for name in names],
            [zlib.crc32(f"{name}{options}".encode()) for name in names],
            [MERGED * merged] * len(names),
        ]
    )


def assignment_in(
    state: Tensor, here: Assignment, composition: Mapping[str, object], merged: bool
) -> Assignment:
    """Who uses which of the targets `here`, whose bank composes so and whose weights hold the
    adapters or not, by the state of a state dict.

    Raises RuntimeError for other targets or another composition, for weights that hold the adapters
    where these do not, and for a state that has become something else.
    """
    with torch.device(state.device):
        own = written(here, composition, merged)
    if own.shape != state.shape or not _same_sums(own[2], state[2]):
        given = dict(composition)
        options = f", or with other options than {given}" * bool(given)
        raise RuntimeError(
            f"the state dict adapts other targets than the {len(here.targets)} of this model"
            f"{options}: inject it with the configuration that the state dict was made with"
        )
    state = _whole(state)
    if (state[3] == MERGED).any() and not merged:
        raise RuntimeError(
            "the state dict was taken while the adapters were merged, so its weights hold them "
            "already: call loradrop.remove(model) there first, or take loradrop.save's file"
        )
    slots = tuple(None if slot < 0 else slot for slot in state[0].tolist())
    names, kept = [target.name for target in here.targets], None
    if (state[1] >= 0).all():
        kept = tuple(name for name, own in zip(names, state[1].tolist(), strict=True) if own)
    return Assignment(here.targets, slots, kept)


def _same_sums(here: Tensor, there: Tensor) -> bool:
    """Whether checksums agree as far as `there` can say: an average or a cast of state dicts has
    them as floats, and those of float16 are endless.
    """
    if not there.is_floating_point():
        return torch.equal(here, there)
    known = there.double().isfinite()
    digits = max(4 * torch.finfo(there.dtype).eps, 1e-6)
    close = torch.isclose(there.double(), here.double(), rtol=digits, atol=0.0)
    return bool(close[known].all())


def _whole(state: Tensor) -> Tensor:
    """A state as integers. Raises RuntimeError for one that has become something else, as an
    average of several assignments, or in a type that cannot count as far.
    """
    if not state.is_floating_point():
        return state
    rows = state[[0, 1, 3]].double()
    largest, off = float(rows.abs().max()), float((rows - rows.round()).abs().max())
    error = largest * torch.finfo(state.dtype).eps
    exact, near = off == 0.0 and error <= 2.0, off <= max(0.01, 4.0 * error) < 0.5
    if not (exact or near):
        raise RuntimeError(
            f"lora_bank.{STATE} of the state dict, of {state.dtype}, does not say who shares which "
            "adapter: it is an average of state dicts that share differently, or of a narrow type. "
            "Average those alone that share alike, and leave this entry as one of them has it"
        )
    whole = torch.zeros_like(state, dtype=torch.int64)
    whole[[0, 1, 3]] = rows.round().long()
    return whole
