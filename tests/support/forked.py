"""The one process that tests fork others from: it has imported what would take each of them several seconds."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

IMPORTED_ONCE = [
    *("pytest", "driven_runs", "ptl_rl.cli", "ptl_rl.reporting.live"),
    *("transformers", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "verl.workers.engine"),
]
"""All that any of them needs: the process is started once, for the first that asks."""


def fork_server() -> ForkServerContext:
    os.environ.pop("PTL_RUN_ID", None)  # of an earlier driver here; the process would be one of its own
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


def _answer(connection: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        connection.send((function(*arguments), None))
    except BaseException as error:
        connection.send((None, error))
        raise


def call_forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns in a process of its own; it must stand at the top of its module."""
    context = fork_server()
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(its, function, arguments))
    process.start()
    its.close()
    try:
        answer, error = ours.recv()
    finally:
        process.join()
    if error is not None:
        raise error
    return answer
