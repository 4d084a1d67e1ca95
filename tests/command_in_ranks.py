"""`loradrop` for torchrun, as `python -m loradrop`: ARGUMENTS. It leaves no group behind."""

from torchrun import leave

from loradrop.command.cli import main
from loradrop.machine import is_distributed

if __name__ == "__main__":
    status = main()
    assert status == 0 and not is_distributed(), (status, is_distributed())
    leave()
