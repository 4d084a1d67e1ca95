"""The stream that launches go to, Triton's and those of csrc/."""

import torch


def current_stream(device: int) -> int:
    """The current stream of a device as the driver's number; 0 on a CPU, whose device is -1.

    As Triton asks for it: `torch.cuda.current_stream` makes an object each time.
    """
    return 0 if device < 0 else int(torch._C._cuda_getCurrentRawStream(device))
