"""Entry point of a stage's own process: ``python -m ptl_rl.driver.stage_main SPEC.json``."""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ptl_rl.stage import StageContext, load_context
from ptl_rl.verl_patches import quick_imports


def die_with_parent() -> None:
    """Linux: have the kernel end this process when the driver dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def _function(context: StageContext) -> Callable[[StageContext], dict]:
    name = context.spec.name
    modules = {
        "score": "ptl_rl.pruning.stages",
        "slice": "ptl_rl.pruning.stages",
        "recover": f"ptl_rl.recovery.{context.recovery.method}",
        "evaluate": "ptl_rl.evaluation.runner",
    }
    return getattr(importlib.import_module(modules[name]), name)


def main() -> None:
    quick_imports.prepare()
    context = load_context(Path(sys.argv[1]))
    spec = context.spec
    if spec.device == "cpu" and spec.name != "evaluate":  # which has no part of verl
        from ptl_rl.cpu.checks import assert_cpu_platform_active

        assert_cpu_platform_active()
    started = time.time()
    metrics = _function(context)(context)
    metrics["stage_seconds"] = time.time() - started
    temporary = spec.result.with_suffix(".tmp")
    temporary.write_text(json.dumps(metrics))
    temporary.rename(spec.result)
    import ray

    ray.shutdown()
    # Library threads (vLLM, TransferQueue) must not keep a finished stage alive.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    die_with_parent()
    main()
