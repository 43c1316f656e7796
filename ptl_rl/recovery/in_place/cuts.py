"""What was cut in place so far: kept in every checkpoint of the training, and in a folder of its own for each cut."""

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ptl_rl.config import RunConfig
from ptl_rl.config.in_place import CutInPlace, cuts_in_place
from ptl_rl.errors import UserError
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.stage import AFTER_CUT

IN_CHECKPOINT = "cuts.json"
"""Beside what verl writes of a step."""
GOVERNOR = "governor.json"
"""Likewise, of a training that finds its own pace: what it has seen."""


class CutsLost(UserError, RuntimeError):
    """A checkpoint of a training in place that does not say what was cut; the message names the file."""


class CutRecord(BaseModel):
    """One cut that was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after_step: int
    plan: PruningPlan
    """Of the channels that stood before."""
    sliced: int = 0
    """So many earlier cuts were sliced off then; the policy had the shapes that these had left."""
    facts: dict[str, Any] = {}
    """What the journal says of it."""


@dataclass
class Cuts:
    """The cuts of one training, made and still to be made."""

    planned: list[CutInPlace]
    made: list[CutRecord]

    @classmethod
    def of(cls, config: RunConfig) -> "Cuts":
        return cls(cuts_in_place(config), [])

    @property
    def plans(self) -> list[PruningPlan]:
        return [record.plan for record in self.made]

    def due(self, step: int) -> CutInPlace | None:
        """The cut to be made once ``step`` steps are done, if it was not made."""
        following = self.planned[len(self.made) :]
        return following[0] if following and following[0].after_step <= step else None

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([record.model_dump(mode="json") for record in self.made]))

    def load(self, path: Path) -> None:
        """Take up what :meth:`save` wrote.

        Raises:
            CutsLost: it is not there, or cannot be read.
        """
        try:
            self.made = [CutRecord.model_validate(record) for record in json.loads(path.read_text())]
        except (OSError, ValueError, ValidationError) as error:
            raise CutsLost(
                f"{path}: a training in place cannot go on without knowing what it has cut ({error}); put the file "
                f"back, or delete {path.parent.parent}, and the training begins anew"
            ) from None


def as_it_was_cut(work: Path, number: int) -> Path:
    """Folder of the policy right after its ``number``-th cut, with the shapes that it has in training."""
    return work / AFTER_CUT / f"{number:03d}"


def folder_of(cuts: Path, number: int) -> Path:
    """Of the ``number``-th cut, from 1."""
    return cuts / f"{number:03d}"


def steps_with_cuts(cuts: Path) -> set[int]:
    """Steps after which the cuts that have a folder were made."""
    found = set()
    for path in cuts.glob("[0-9]*/cut.json"):
        with contextlib.suppress(FileNotFoundError):  # it is being put in the place of an earlier one
            found.add(json.loads(path.read_text())["after_step"])
    return found


def publish(cuts: Path, records: Sequence[CutRecord]) -> None:
    """Give every cut that has none its folder, with ``plan.json`` and ``cut.json``, whole or not at all."""
    for number, record in enumerate(records, 1):
        final = folder_of(cuts, number)
        text = json.dumps({"after_step": record.after_step, **record.facts}, indent=1) + "\n"
        if (final / "cut.json").exists() and (final / "cut.json").read_text() == text:
            continue
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        record.plan.save(temporary / "plan.json")
        (temporary / "cut.json").write_text(text)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
