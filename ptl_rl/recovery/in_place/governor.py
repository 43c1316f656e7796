"""When the next cut may come: once validation is back near what the uncut model had, and not before. Pure arithmetic.

A frog that has not got used to the water is not heated further: steps are made after a cut until the running accuracy
is back within ``recovered`` of the start's, or until ``patience`` steps brought nothing new. At the target the steps
that are left go on improving the model that is there.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from ptl_rl.errors import UserError

Action = Literal["cut", "go on", "end"]


class NothingToKeep(UserError, ValueError):
    """Validation says nothing of what a cut costs; the message says what to mend."""


class Passed(BaseModel):
    """The model that the run would end with now: the smallest that was as good as asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    """Of the weights, relative to the recovery's work folder: a run's folder may be moved."""
    cuts: int
    """That had been made."""
    sliced: int = 0
    """Of these, sliced off."""
    step: int
    accuracy: float


class Governor(BaseModel):
    """What has been seen of a training that finds its own pace; kept in every checkpoint."""

    model_config = ConfigDict(extra="forbid")

    share: float
    """Of the start's accuracy that must be back."""
    patience: int
    baseline: float | None = None
    """Accuracy on the validation problems before anything was cut."""
    best: float = -1.0
    """Highest accuracy since the last cut."""
    best_step: int = 0
    passed: Passed | None = None
    stuck: str = ""
    """Why no further cut was possible when one was last tried; empty if it was."""
    stuck_at: float = 0.0
    """Accuracy at that time. A better model may have room for a cut, so one is tried again then."""

    def begins_with(self, accuracy: float) -> None:
        """Take what validation says of the uncut model.

        Raises:
            NothingToKeep: it solves nothing, by which no cut can be judged.
        """
        if accuracy <= 0:
            raise NothingToKeep(
                f"schedule.pace governed judges every cut by data.validation, of which the uncut model solves nothing "
                f"({accuracy:g}); give problems that it can solve, or use pace fixed"
            )
        self.baseline = accuracy

    def is_recovered(self, accuracy: float) -> bool:
        assert self.baseline is not None
        return accuracy >= self.share * self.baseline - 1e-9

    def has_cut(self, step: int) -> None:
        """A cut was made after ``step``: patience begins anew."""
        self.best, self.best_step, self.stuck, self.stuck_at = -1.0, step, "", 0.0

    def is_stuck(self, why: str, accuracy: float) -> None:
        """No cut did as little damage as asked for."""
        self.stuck, self.stuck_at = why, accuracy

    def is_better(self, accuracy: float, cuts: int) -> bool:
        """Whether the model is to be kept as the one that the run would end with."""
        if not self.is_recovered(accuracy):
            return False
        return self.passed is None or cuts > self.passed.cuts or accuracy > self.passed.accuracy

    def judge(self, step: int, accuracy: float, at_target: bool) -> Action:
        """What comes after an accuracy that was measured after ``step``."""
        if accuracy > self.best:
            self.best, self.best_step = accuracy, step
        may_fit = not self.stuck or accuracy > self.stuck_at
        if self.is_recovered(accuracy) and not at_target and may_fit:
            return "cut"
        return "end" if step - self.best_step >= self.patience else "go on"
