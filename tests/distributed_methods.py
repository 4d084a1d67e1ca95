"""Every method in DDP, for torchrun: FOLDER; each rank trains on half of the rows."""

import sys
from pathlib import Path

import torch
from every_method import EVERY, X, by_sgd, net
from torch.nn.parallel import DistributedDataParallel
from torchrun import leave


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    rows = X[rank::2].contiguous()
    found = {
        name: by_sgd(net(method), rows, DistributedDataParallel) for name, method in EVERY.items()
    }
    torch.save(found, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
