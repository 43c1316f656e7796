"""Run a function on several ranks, each a process of its own."""

import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forked import fork_server


def _main(
    rank: int, ranks: int, environment: dict[str, str], backend: str, function: Callable, arguments: tuple
) -> None:
    os.environ.clear()
    os.environ |= environment
    torch.set_num_threads(1)
    dist.init_process_group(backend, rank=rank, world_size=ranks)
    function(rank, ranks, *arguments)
    dist.barrier()
    # FSDP's modules keep the process group alive into the interpreter's end, where its threads may abort the process.
    os._exit(0)


def run_ranks(function: Callable, ranks: int, *arguments, backend: str = "gloo") -> None:
    """Call ``function(rank, ranks, *arguments)`` in so many processes; it must stand at the top of its module."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fork_server()
    given = (ranks, environment, backend, function, arguments)
    mp.start_processes(_main, given, nprocs=ranks, start_method="forkserver")
