"""What a stage process is told, and how it reports: the contract between the driver and the work.

A stage runs in a process of its own, so that verl's and vLLM's global state ends with it. It reads a
:class:`StageSpec`, fills the folder ``out``, appends progress lines, and writes its metrics to ``result``; the driver
alone renames, journals and deletes.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ptl_rl.config import AnyRecovery, RunConfig
from ptl_rl.config.recipe import read_saved_config
from ptl_rl.data.frozen import FrozenData


class NewLines:
    """Reads the whole lines of a growing file of JSON lines that came since the last time."""

    def __init__(self, path: Path) -> None:
        self.path, self._position = path, 0

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        with self.path.open() as file:
            file.seek(self._position)
            while (line := file.readline()).endswith("\n"):
                self._position = file.tell()
                lines.append(json.loads(line))
        return lines


class StageSpec(BaseModel):
    """Everything that one stage needs beside the run's configuration. Paths are absolute."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["score", "slice", "recover", "evaluate"]
    cycle: int
    round: int
    part: int = 0
    """Which of the cycle's recoveries this is, from 0."""
    planned: int = 0
    """Which of the planned cuts the cycle makes, from 0."""
    unlearnable: bool = False
    """Whether the recovery is one of those that follow where rewards taught nothing."""
    device: Literal["cpu", "cuda"]
    attention: str
    """What ``model.attention`` comes to, as transformers' ``attn_implementation`` takes it."""
    ray_address: str
    stage_id: str
    """Unique per start; every process of the stage carries it in the environment as PTL_STAGE_ID."""
    source: Path
    """Checkpoint folder to read."""
    parent: Path
    """Folder of the unpruned model, which recoveries may learn from."""
    out: Path
    """Empty folder to fill; renamed to its final name once the stage is verified."""
    work: Path
    """Folder that outlives a killed stage, for checkpoints within a recovery."""
    progress: Path
    result: Path
    data: Path
    """Folder of the run's data, as :func:`ptl_rl.data.frozen.freeze` wrote it."""
    subset: int
    """Which of the subsets is this cycle's own, from 0."""
    subsets: int
    remove_channels: int
    remove_layers: int
    removed_layers: int
    """How many blocks of the original model are gone before this cycle."""
    steps: int
    alignment: int
    scores: Path | None = None
    after_cut: Path | None = None
    """For ``evaluate``: the cut model before its recovery, where that is measured, too."""

    @property
    def file(self) -> Path:
        """Where the driver leaves this, for :func:`load_context`."""
        return self.progress.with_name(self.progress.name.removesuffix(".progress.jsonl") + ".spec.json")

    @property
    def cuts(self) -> Path:
        """Folder of the cuts that a recovery makes in place, which stays."""
        return self.work.parent / "cuts"


def is_in_place(config: RunConfig, spec: StageSpec) -> bool:
    """Whether a recovery makes the run's cuts, too; where the gate asks for more steps, they are made."""
    return config.schedule.mode == "in_place" and spec.name == "recover" and not spec.round


AFTER_CUT = "after_cut"
"""Folder of the cut model before its recovery, within what a recovery in place leaves."""

PART_SEED = 15_485_863
"""Between the seeds of a cycle's recoveries, which read the same rows: no two take them in one order."""


def stage_seed(config: RunConfig, spec: StageSpec) -> int:
    """Differs from cycle to cycle, round to round and part to part, and follows from the run's seed."""
    return config.seed * 1_000_003 + spec.cycle * 1009 + spec.part * PART_SEED + spec.round


def _setup_hook() -> dict[str, str]:
    """What Ray's workers do first, for ``ray.init``; a submitted job's own hook stays."""
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    submitted = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR) or "{}").get("runtime_env") or {}
    if "worker_process_setup_hook" in submitted:
        return {}
    return {"worker_process_setup_hook": "ptl_rl.verl_patches.quick_imports.prepare"}


@dataclass
class StageContext:
    """A stage's view of the run."""

    config: RunConfig
    spec: StageSpec

    def report(self, done: int, total: int, **metrics: Any) -> None:
        """Tell the driver that ``done`` of ``total`` steps are finished; silence means the stage hangs."""
        line = json.dumps({"time": time.time(), "done": done, "total": total, "metrics": metrics})
        with self.spec.progress.open("a") as file:
            file.write(line + "\n")

    @property
    def recovery(self) -> AnyRecovery:
        """What the recipe says of this recovery."""
        return self.config.recoveries(self.spec.planned, self.spec.unlearnable)[self.spec.part]

    @property
    def data(self) -> FrozenData:
        """The run's data; not kept, as the context goes to workers."""
        return FrozenData(self.spec.data)

    @property
    def seed(self) -> int:
        return stage_seed(self.config, self.spec)

    def connect_ray(self) -> None:
        """Join the run's Ray session as a job of its own; its actors end with this process."""
        import ray

        ray.init(
            address=self.spec.ray_address,
            namespace=self.spec.stage_id,
            runtime_env={"env_vars": self.worker_env(), **_setup_hook()},
            logging_level="WARNING",
        )

    def wait_for_workers(self, seconds: float = 120) -> None:
        """Wait until a former job of this stage has let go of its GPUs, which Ray takes back a little later.

        In a cluster that others use as well, GPUs of theirs that are free count, too: verl may then find too few and
        say so, and the run is resumed from where it stood.

        Raises:
            TimeoutError: it has not.
        """
        import ray

        from ptl_rl.config import DistillConfig

        self.connect_ray()
        try:
            resources, recovery, until = self.config.resources, self.recovery, time.monotonic() + seconds
            wanted = float(resources.workers)
            if self.spec.device == "cpu" and isinstance(recovery, DistillConfig):  # on GPUs it is among them
                wanted += recovery.teacher_workers_per_node * resources.nodes
            wanted = min(wanted, ray.cluster_resources().get("GPU", 0.0))
            while (free := ray.available_resources().get("GPU", 0.0)) < wanted:
                if time.monotonic() > until:
                    raise TimeoutError(f"{free:g} of {wanted:g} GPUs are free {seconds:g} s after a training has ended")
                time.sleep(0.5)
        finally:
            ray.shutdown()

    def worker_env(self) -> dict[str, str]:
        """Environment of this stage's Ray workers."""
        from ptl_rl.cpu.checks import cuda_env_vars, evaluation_env, ray_runtime_env

        if self.spec.device == "cpu" and self.spec.name == "evaluate":
            env = evaluation_env(self.config.resources.workers)
        elif self.spec.device == "cpu":
            env = ray_runtime_env(self.config.resources.workers)["env_vars"]
        else:
            from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

            env = {**get_ppo_ray_runtime_env()["env_vars"], "TRANSFER_QUEUE_ENABLE": "1", **cuda_env_vars()}
        for name in ("PTL_RUN_ID", "PTL_REWARD_ERRORS", "VERL_FILE_LOGGER_PATH"):
            if name in os.environ:
                env[name] = os.environ[name]
        return {**env, "PTL_STAGE_ID": self.spec.stage_id}


def load_context(spec_file: Path) -> StageContext:
    """Of the stage whose file this is."""
    config = read_saved_config(spec_file.parent.parent / "config.json")
    return StageContext(config, StageSpec.model_validate_json(spec_file.read_text()))
