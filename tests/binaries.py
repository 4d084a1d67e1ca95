"""Compiled kernels for tests, on no device: Triton's own launcher runs, but for its last step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from triton.backends.nvidia import driver as nvidia


class Binary:
    """A binary with Triton's own launcher, whose last step calls `step` with what it is told.

    signature, metadata   of the kernel, as Triton keeps them; metadata of its descriptors
    """

    function, packed_metadata = 7, "packed"

    def __init__(
        self,
        step: Callable[..., object],
        signature: dict[int, str] | None = None,
        metadata: list[Any] | None = None,
    ) -> None:
        self.run = launcher = object.__new__(nvidia.CudaLauncher)
        last = partial(step)  # as a function of C, without a closure
        launcher.launch = nvidia.wrap_handle_tensordesc(last, signature or {}, metadata)
        launcher.num_ctas, launcher.arg_annotations, launcher.kernel_signature = 1, "seen", b"how"
        launcher.global_scratch_size = launcher.global_scratch_align = 0
        launcher.profile_scratch_size = launcher.profile_scratch_align = 0
        launcher.launch_cooperative_grid = launcher.launch_pdl = False


def whole(told: Sequence[Any]) -> list[Any]:
    """What a last step was told, one after the other: its arguments may be a sequence or not."""
    *first, last = told
    return [*first, *last] if isinstance(last, list | tuple) else [*told]
