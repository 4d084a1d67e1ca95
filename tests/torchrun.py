"""Scripts of the tests that torchrun runs in several processes: how one begins, and how it ends."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

TESTS = Path(__file__).parent


def torchrun(*arguments: Any, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder, or with "-m" a module, with its arguments."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    env |= {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, cwd=TESTS)


def leave() -> NoReturn:
    """End this process without Python's own end: a model that FSDP2 sharded keeps its group's
    threads until then, and one that still lets go of a tensor there aborts the process
    (pytorch/pytorch#190489).
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
