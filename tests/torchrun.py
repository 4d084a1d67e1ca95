"""Scripts of the tests that run in several processes: how they begin, and how one ends."""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

TESTS = Path(__file__).parent
PATIENCE = 600  # seconds


def torchrun(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder in two processes, with its arguments."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    env |= {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=PATIENCE, cwd=TESTS
    )
    return done


def forking() -> ForkServerContext:
    """Processes that begin in no time: of a server that has imported what they need, and run
    nothing. They have one hash seed, so their sets have one order: what may depend on that is for
    `torchrun`.
    """
    context = multiprocessing.get_context("forkserver")
    preloaded = ["loradrop.training.fit", "datasets", "transformers.models.bert.modeling_bert"]
    context.set_forkserver_preload(preloaded)
    return context


def in_ranks(function: Callable[..., None], *arguments: Any, processes: int = 2) -> list[int]:
    """The function, which ends with `leave`, in each process with its rank and then the arguments:
    with what exit codes they ended. Where one fails, or none ends in time, the others are killed.
    """
    context = forking()
    ranks = [
        context.Process(target=function, args=(i, *arguments), daemon=True)
        for i in range(processes)
    ]
    for rank in ranks:
        rank.start()
    left = {rank.sentinel: rank for rank in ranks}
    while left:
        ended = wait(left, PATIENCE)
        failed = not ended or any(_ended(left.pop(which)) for which in ended)  # type: ignore[index]
        for rank in left.values() if failed else ():
            rank.kill()
    return [_ended(rank) for rank in ranks]


def _ended(rank: ForkServerProcess) -> int:
    rank.join()
    assert rank.exitcode is not None
    return rank.exitcode


def script_in_ranks(
    script: str, *arguments: Any, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """As `torchrun` would run it, without its seconds; in one process as a script alone."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        given = [str(argument) for argument in arguments]
        for name in ("out", "err"):
            Path(folder, name).touch()
        codes = in_ranks(_script, processes, port, folder, script, given, processes=processes)
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess([script, *given], max(map(abs, codes)), out, err)


def _script(
    rank: int, processes: int, port: int, folder: str, script: str, arguments: list[str]
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
    if processes > 1:
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        facts |= {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
        os.environ.update({name: str(value) for name, value in facts.items()})
    gc.freeze()  # as conftest.py does, for whoever collects garbage in each of many runs
    sys.argv, sys.path[:0] = [script, *arguments], [str(TESTS)]
    runpy.run_path(str(TESTS / script), run_name="__main__")


def leave() -> NoReturn:
    """End this process before Python lets go of models: one that FSDP2 sharded, or DDP holds, keeps
    its group's threads, and where one of these still lets go of a tensor, the process aborts
    (pytorch/pytorch#190489) or waits for ever.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
