"""What a training has ended with that did not make all of its steps, or chose among its models itself."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ptl_rl.recovery.in_place.cuts import CutRecord

LEFT_BY_TRAINING = "passed"
"""Folder, within a recovery's work folder, of models that the training may end with."""


class Outcome(BaseModel):
    """The model that counts, and why it is that one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    """Of the weights, with the shapes that training had; relative to the recovery's work folder."""
    made: list[CutRecord]
    """The cuts that are in these weights."""
    sliced: int = 0
    """So many of them are sliced off there; the others are zero."""
    steps: int
    """Optimizer steps of the whole training."""
    why: str
    learns: bool = True
    """Whether more steps might bring more; false where rewards had nothing more to teach."""

    @staticmethod
    def file(work: Path) -> Path:
        return work / "outcome.json"

    def save(self, work: Path) -> None:
        temporary = self.file(work).with_suffix(".tmp")
        temporary.write_text(self.model_dump_json())
        temporary.replace(self.file(work))

    @classmethod
    def load(cls, work: Path) -> "Outcome | None":
        path = cls.file(work)
        return cls.model_validate_json(path.read_text()) if path.exists() else None
