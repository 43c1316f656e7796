"""The trainer whose cuts come when the policy has recovered, as large as measured damage allows."""

import shutil
from typing import Any

from verl.trainer.ppo.v1 import register_trainer
from verl.utils.debug import marked_timer

from ptl_rl.config.in_place import CutInPlace
from ptl_rl.data.encoding import Sequence
from ptl_rl.pruning.live import NoCutFits
from ptl_rl.recovery.in_place.cuts import GOVERNOR, CutsLost, publish
from ptl_rl.recovery.in_place.governor import Governor, Passed
from ptl_rl.recovery.in_place.trainer import InPlaceTrainer
from ptl_rl.recovery.rl import GOVERNED
from ptl_rl.recovery.rl.outcome import LEFT_BY_TRAINING, Outcome

PATIENCE = "pruning/patience_left"
"""verl's metric of a step: how many more there are without a better validation accuracy before the training ends."""


def accuracy_of(metrics: dict[str, float]) -> float:
    """Of what verl's validation gives: the mean over data sources of what it calls its core.

    Raises:
        ValueError: it has measured nothing.
    """
    found = [float(value) for key, value in metrics.items() if key.startswith("val-core/") and "/mean@" in key]
    if not found:
        raise ValueError(f"verl's validation gave no accuracy, only {sorted(metrics)}")
    return sum(found) / len(found)


@register_trainer(GOVERNED)
class GovernedTrainer(InPlaceTrainer):
    """One training with as many cuts as it takes."""

    def __init__(self, config) -> None:
        super().__init__(config)
        schedule = self.context.config.schedule
        self.governor = Governor(share=schedule.recovered, patience=schedule.patience)
        self.cuts.planned = []  # they come when they may
        self.batch: Any = None
        self.save_asked = False
        self.saved: Passed | None = None
        """As the last checkpoint names it."""

    @property
    def left(self) -> int:
        """Channels that every block is still to lose."""
        return self.context.config.schedule.channels_sum - sum(
            plan.source_intermediate_size - plan.intermediate_size for plan in self.cuts.plans
        )

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            path = self._step_folder() / GOVERNOR
            try:
                self.governor = Governor.model_validate_json(path.read_text())
            except (OSError, ValueError) as error:
                raise CutsLost(
                    f"{path}: a training that finds its own pace cannot go on without what it has seen ({error}); put "
                    f"the file back, or delete {path.parent.parent}, and the training begins anew"
                ) from None
            self.saved = self.governor.passed

    def _write_state(self) -> None:
        super()._write_state()
        (self._step_folder() / GOVERNOR).write_text(self.governor.model_dump_json())

    def _save_checkpoint(self) -> None:
        """verl asks for it before this step's cut: it waits until that is made, as no checkpoint is written over."""
        self.save_asked = True

    def _validate(self) -> dict[str, float]:
        metrics = super()._validate()
        if self.governor.baseline is None:
            self.governor.begins_with(accuracy_of(metrics))
        return metrics

    def on_train_begin(self) -> None:
        super().on_train_begin()
        if not self.cuts.made and self.global_steps == 1:
            if self.governor.baseline is None:
                self._validate()
            if self.context.config.calibration.source != "rollouts":
                self._make([], 0, self.global_steps)
            # Else there are none yet, and what a cut costs is measured on them: it comes after the first step.

    def _make(self, rollouts: list[Sequence], step: int, version: int) -> None:
        """Make the first cut, which must be possible.

        Raises:
            NoCutFits: it is not; the setting to raise is named.
        """
        self.checkpoint_manager.sleep_replicas()
        try:
            self._cut_as_far_as_it_goes(rollouts, step)
        except NoCutFits as error:
            raise NoCutFits(f"{error}; raise it, in a new run") from None
        if step:
            self._save_now()
        publish(self.context.spec.cuts, self.cuts.made)
        self.checkpoint_manager.update_weights(version)

    def step(self, metrics: dict, timing_raw: dict) -> Any:
        self.batch = super().step(metrics, timing_raw)
        metrics[PATIENCE] = self.governor.patience - (self.global_steps - self.governor.best_step)
        return self.batch

    def govern(self) -> None:
        is_last = self.global_steps >= self.total_training_steps
        dead = self.learnable.why
        if not self.cuts.made and not is_last:
            with marked_timer("cut", self.timing_raw, color="yellow"):
                self._make(self._rollouts(self.batch), self.global_steps, self.global_steps)
        elif is_last or dead or self.global_steps % self.context.config.schedule.validate_every == 0:
            self._govern(is_last, dead)
        if self.save_asked and self.global_steps < self.total_training_steps:  # else the outcome is there
            self._save_now()
        self.save_asked = False

    def _save_now(self) -> None:
        super()._save_checkpoint()
        self.saved = self.governor.passed
        self._tidy()

    def _tidy(self) -> None:
        """Delete models that neither this process nor the last checkpoint, from which it may go on, would end with."""
        needed = {passed.folder for passed in (self.saved, self.governor.passed) if passed is not None}
        for folder in (self.work / LEFT_BY_TRAINING).glob("*"):
            if f"{LEFT_BY_TRAINING}/{folder.name}" not in needed:
                shutil.rmtree(folder)

    @property
    def may_end(self) -> bool:
        """Not without a look at validation: what has nothing more to learn may be good enough for the next cut."""
        return False

    def _govern(self, is_last: bool, dead: str | None) -> None:
        with marked_timer("testing", self.timing_raw, color="green"):
            metrics = self._validate()
        self._pending_sync_metrics = {**(getattr(self, "_pending_sync_metrics", None) or {}), **metrics}
        accuracy = accuracy_of(metrics)
        if self.governor.is_better(accuracy, len(self.cuts.made)):
            self._keep(accuracy)
        action = self.governor.judge(self.global_steps, accuracy, self.left <= 0)
        cut = False
        if action == "cut" and not is_last:
            with marked_timer("cut", self.timing_raw, color="yellow"):
                self.checkpoint_manager.sleep_replicas()
                try:
                    self._cut_as_far_as_it_goes(self._rollouts(self.batch), self.global_steps)
                    cut = True
                except NoCutFits as error:
                    self.governor.is_stuck(str(error), accuracy)
                self._save_now()
                publish(self.context.spec.cuts, self.cuts.made)
                self.checkpoint_manager.update_weights(self.global_steps)
        if is_last:
            self._end(f"the steps are spent; {dead}" if dead else "the steps are spent", learns=not dead)
        elif dead and not cut:
            self._end(dead, learns=False)
        elif action == "end":
            self._end(f"{self.governor.patience} steps brought nothing more")

    def _cut_as_far_as_it_goes(self, rollouts: list[Sequence], step: int) -> None:
        damages = self.context.config.schedule.damages
        allowed = damages[min(len(self.cuts.made), len(damages) - 1)]
        self._cut(CutInPlace(self.left, 0, step), rollouts, step, allowed)
        self.governor.has_cut(step)

    def _keep(self, accuracy: float) -> None:
        """Write the model that the run would end with now."""
        folder, step = self._written(f"{self.global_steps:06d}"), self.global_steps
        self.governor.passed = Passed(
            folder=folder, cuts=len(self.cuts.made), sliced=self._sliced, step=step, accuracy=accuracy
        )
        self._tidy()

    def _end(self, why: str, learns: bool = True) -> None:
        """Say what the training ends with, and make this step its last."""
        width, stuck, sliced = self.width, self.governor.stuck, self._sliced
        passed, made = self.governor.passed, self.cuts.made
        if passed is None:
            folder = self._written("last")
            said = f"no model got back to {self.governor.share:.0%} of the start's accuracy; this is the last one"
            kept = made
        else:
            reached = "the target" if self.left <= 0 and passed.cuts == len(made) else "the smallest that passed"
            kept, sliced = made[: passed.cuts], passed.sliced
            said = f"{reached}, of step {passed.step}, with {passed.accuracy:.1%} on validation"
            if passed.cuts < len(made):
                said += f"; {width} channels did not get back to {self.governor.share:.0%} of the start's accuracy"
            said += f"; {stuck}" if stuck else ""
            folder = passed.folder
        why = f"{why}; {said}"
        ended = {"made": kept, "sliced": sliced, "steps": self.global_steps}
        Outcome(folder=folder, why=why, learns=learns, **ended).save(self.work)
        self._make_last()
