"""The one process that tests fork others from: it has imported what would take each of them several seconds."""

import multiprocessing
import os
from multiprocessing.context import ForkServerContext

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
