"""A run's plan: cycles, memory, disk, hours and price put together, and what of it will not fit."""

from dataclasses import dataclass, replace
from typing import Any

from ptl_rl.attention import FLASH, without_flash
from ptl_rl.config import CptConfig, RunConfig
from ptl_rl.families import ModelShape
from ptl_rl.planning.assumptions import CPU, Assumptions
from ptl_rl.planning.disk import DiskUse, disk_use
from ptl_rl.planning.duration import Clock, StageTime
from ptl_rl.planning.findings import findings
from ptl_rl.planning.hardware import GIB, Device, gpu_of_this_machine, known_gpu, this_machine
from ptl_rl.planning.lengths import length_notes, too_long
from ptl_rl.planning.memory import Phase, Planned, phases
from ptl_rl.planning.model import PlannedModel
from ptl_rl.planning.rows import unnamed_notes
from ptl_rl.planning.schedule import Cut, methods_and_steps, planned_cuts, recovery_steps

DEFAULT_GPU = "h200"


@dataclass(frozen=True)
class PlannedCycle:
    """One row of the plan: the model that a cycle leaves, and what its recoveries read."""

    cut: Cut | None
    shape: ModelShape
    recoveries: str
    rollouts: int
    read_tokens: int


@dataclass(frozen=True)
class Forecast:
    """Everything that ``ptl plan`` prints."""

    config: RunConfig
    model: PlannedModel
    device: Device
    gpus: int
    attention: str
    cycles: list[PlannedCycle]
    phases: list[Phase]
    disk: DiskUse
    times: list[StageTime]
    assumed: Assumptions
    price_per_gpu_hour: float | None
    problems: list[str]
    """What will not fit, each with its remedy."""
    notes: list[str]

    @property
    def seconds(self) -> float:
        return sum(time.seconds for time in self.times)

    @property
    def price(self) -> float | None:
        if self.price_per_gpu_hour is None:
            return None
        return self.price_per_gpu_hour * self.gpus * self.seconds / 3600

    @property
    def checkpoint_seconds(self) -> float:
        """Of writing the largest checkpoint within a recovery."""
        return self.disk.resumable / (self.assumed.disk_gb_per_second * 1e9)

    def cycle_seconds(self, cycle: int) -> float:
        return sum(time.seconds for time in self.times if time.cycle == cycle)

    def as_json(self) -> dict[str, Any]:
        """The plan in JSON's types; bytes and seconds as integers and floats."""
        return {
            "name": self.config.name,
            "model": self.model.name,
            "device": {"name": self.device.name, "memory_gib": round(self.device.memory_gib, 1), "count": self.gpus},
            "attention": self.attention,
            "cycles": [
                {
                    "cycle": number,
                    "num_hidden_layers": row.shape.num_hidden_layers,
                    "intermediate_size": row.shape.intermediate_size,
                    "parameters": row.shape.parameters,
                    "flops_per_token": row.shape.flops_per_token(),
                    "recoveries": row.recoveries,
                    "rollouts": row.rollouts,
                    "read_tokens": row.read_tokens,
                    "hours": round(self.cycle_seconds(number) / 3600, 3),
                }
                for number, row in enumerate(self.cycles)
            ],
            "memory": [
                {
                    "phase": phase.name,
                    "cycle": phase.cycle,
                    "gib": round(phase.bytes / GIB, 2),
                    "parts_gib": {name: round(size / GIB, 2) for name, size in phase.parts.items() if size},
                    "host_gib_per_node": round(phase.host / GIB, 1),
                    "sequences_in_cache": None if phase.room is None else int(phase.room),
                }
                for phase in self.phases
            ],
            "disk": {
                "kept_gib": round(self.disk.kept / GIB, 2),
                "peak_gib": round(self.disk.peak / GIB, 2),
                "each_extension_gib": round(self.disk.extension / GIB, 2),
                "resumable_checkpoint_gib": round(self.disk.resumable / GIB, 2),
                "resumable_checkpoint_seconds": round(self.checkpoint_seconds, 1),
            },
            "stages": [
                {"cycle": time.cycle, "stage": time.stage, "seconds": round(time.seconds, 1)} for time in self.times
            ],
            "hours": round(self.seconds / 3600, 3),
            "price": None if self.price is None else round(self.price, 2),
            "assumptions": vars(self.assumed),
            "will_not_fit": self.problems,
            "notes": self.notes,
        }


def device_of(config: RunConfig, gpu: str | None) -> Device:
    """What the run is planned on: ``gpu``, else ``resources.gpu``, else this machine's GPU, else an H200.

    A recipe whose device is ``cpu``, or ``auto`` where there is no GPU, is planned on this machine's CPUs.

    Raises:
        ConfigError: the GPU is not known.
    """
    if gpu is not None:
        return known_gpu(gpu, "`gpu`")
    if config.resources.device == "cpu":
        return this_machine(config.resources.workers)
    if config.resources.gpu is not None:
        return known_gpu(config.resources.gpu, "resources.gpu")
    found = gpu_of_this_machine()
    if found is None and config.resources.device == "auto":
        return this_machine(config.resources.workers)
    return known_gpu(found or DEFAULT_GPU, "`gpu`")


def assumptions_of(device: Device, given: dict[str, float | None]) -> Assumptions:
    """Those of the device, but for what is ``given``."""
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(CPU if device.is_cpu else Assumptions(), **changes)


def assumed_attention(config: RunConfig, device: Device, values: dict[str, Any]) -> str:
    """What ``model.attention: auto`` comes to where flash-attn is installed, which a plan for GPUs assumes."""
    setting = config.model.attention
    if setting != "auto":
        return setting
    return without_flash(values) if device.is_cpu or config.model.dtype == "float32" else FLASH


def planned_cycles(config: RunConfig, shape: ModelShape) -> list[PlannedCycle]:
    """The original and what every planned cut leaves."""
    rows = [PlannedCycle(None, shape, "", 0, 0)]
    for cut in planned_cuts(config.schedule):
        shape = shape.sliced(cut.channels, cut.layers)
        recoveries = config.recoveries(cut.planned)
        counts = [(recovery, recovery_steps(config, cut.planned, part)) for part, recovery in enumerate(recoveries)]
        rolled_out = sum(
            steps * r.prompts_per_step * r.rollouts_per_prompt for r, steps in counts if not isinstance(r, CptConfig)
        )
        read = sum(
            steps * (r.tokens_per_step or r.sequences_per_step * r.max_tokens)
            for r, steps in counts
            if isinstance(r, CptConfig)
        )
        names = " + ".join(f"{steps} {method}" for method, steps in methods_and_steps(config, cut.planned))
        rows.append(PlannedCycle(cut, shape, names, rolled_out, read))
    return rows


def forecast(
    config: RunConfig,
    model: PlannedModel,
    device: Device,
    *,
    assumed: Assumptions | None = None,
    price_per_gpu_hour: float | None = None,
) -> Forecast:
    """Plan a run.

    Args:
        assumed: what hours rest on; by default those of the device.
    """
    assumed = assumed or (CPU if device.is_cpu else Assumptions())
    attention = assumed_attention(config, device, model.values)
    planned, cuts = Planned(config, device, attention), planned_cuts(config.schedule)
    found = phases(planned, model.shape, cuts)
    problems, notes = findings(planned, model.shape, found, cuts)
    if (problem := too_long(config, model.values, "the model")) is not None:
        problems.insert(0, problem)
    notes += [*unnamed_notes(config), *length_notes(config, model.values)]
    if attention == FLASH and config.model.attention == "auto":
        notes.insert(
            0, "flash attention 2 is taken to be installed; without it batches are padded and this plan is low"
        )
    return Forecast(
        config,
        model,
        device,
        config.resources.workers,
        attention,
        planned_cycles(config, model.shape),
        found,
        disk_use(config, model.shape, model.weight_bytes),
        Clock(planned, assumed).run(model.shape, cuts),
        assumed,
        price_per_gpu_hour,
        problems,
        notes,
    )
