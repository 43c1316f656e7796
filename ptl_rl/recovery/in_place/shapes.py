"""A training in place that goes on with the sliced model, where that pays: what it then has to know.

The policy that is trained is sliced with its optimizer's moments, trainer and vLLM start anew with the smaller shapes,
and verl goes on from a checkpoint of these as from any other: its step, learning rate, order of the data and random
state are the same.
"""

import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ptl_rl.config import GrpoConfig
from ptl_rl.config.verl_keys import PARENT
from ptl_rl.families import ModelShape
from ptl_rl.recovery.checkpoints import TRACKER, Checkpoints
from ptl_rl.stage import StageContext

SLICED = "sliced"
"""Folder, within a recovery's work folder, of the model that training goes on with."""
CHECKPOINTS = "checkpoints"
"""Of verl's checkpoints there, of the shapes that the training began with."""


class Shapes(BaseModel):
    """The shapes that a training has now."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cuts: int = 0
    """So many of its cuts are sliced off; 0: the shapes that it began with."""
    why: list[str] = []
    """What the journal says of each time that it was sliced."""

    @property
    def source(self) -> str:
        """Folder of the model, relative to the work folder."""
        return f"{SLICED}/{self.cuts:03d}"

    @property
    def checkpoints(self) -> str:
        """Folder of verl's checkpoints, relative to the work folder."""
        return f"{CHECKPOINTS}-{self.cuts:03d}" if self.cuts else CHECKPOINTS

    @staticmethod
    def file(work: Path) -> Path:
        return work / "shapes.json"

    @classmethod
    def load(cls, work: Path) -> "Shapes":
        path = cls.file(work)
        return cls.model_validate_json(path.read_text()) if path.exists() else cls()

    def save(self, work: Path) -> None:
        """Make these the shapes from which the training goes on."""
        temporary = self.file(work).with_suffix(".tmp")
        temporary.write_text(self.model_dump_json())
        temporary.replace(self.file(work))


def with_shapes(context: StageContext) -> StageContext:
    """The same stage, which reads the model that training goes on with."""
    shapes = Shapes.load(context.spec.work)
    if not shapes.cuts:
        return context
    spec = context.spec.model_copy(update={"source": context.spec.work / shapes.source})
    return StageContext(context.config, spec)


def checkpoints_of(context: StageContext, part: str) -> Checkpoints:
    """verl's checkpoints of the shapes that the training has now; those of earlier ones are deleted.

    Args:
        part: folder of a checkpoint in which the policy is.
    """
    work, shapes = context.spec.work, Shapes.load(context.spec.work)
    kept = {shapes.checkpoints, Path(shapes.source).name}
    for path in (*work.glob(f"{CHECKPOINTS}*"), *work.glob(f"{SLICED}/*")):
        if path.name not in kept:
            shutil.rmtree(path)
    return Checkpoints(work / shapes.checkpoints, context.spec.steps, part)


def verl_settings(context: StageContext) -> dict[str, Any]:
    """verl keys of a training that goes on with a sliced model, beside those of its stage; none before."""
    shapes, recovery = Shapes.load(context.spec.work), context.recovery
    if not shapes.cuts:
        return {}
    settings: dict[str, Any] = {"trainer.default_local_dir": str(context.spec.work / shapes.checkpoints)}
    if isinstance(recovery, GrpoConfig):
        settings["trainer.val_before_train"] = False
        if recovery.kl_to == "start":  # by keys of verl's, too, where kl_loss is 0
            settings[PARENT] = str(context.spec.source)  # what the training began with
    return settings


def mark_whole(folder: Path, step: int) -> None:
    """Have verl find a checkpoint, all of which is there."""
    (folder / TRACKER).write_text(str(step))


def seconds_saved(now: ModelShape, sliced: ModelShape, steps: int, step_seconds: float) -> float:
    """What so many steps take less with the smaller shapes, where a step's time goes with the model's FLOPs."""
    return steps * step_seconds * (1 - sliced.flops_per_token() / now.flops_per_token())
