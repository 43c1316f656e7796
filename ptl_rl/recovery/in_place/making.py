"""What every training in place does beside training: make the cuts, and leave a sliced model to go on with.

Trainers of verl's get it by inheritance, whichever way they take their steps.
"""

import math
import shutil
import statistics
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any

from ptl_rl.config.in_place import CutInPlace
from ptl_rl.config.recovery import AFTER_CUTS
from ptl_rl.data.encoding import Sequence
from ptl_rl.data.partition import subset_hash
from ptl_rl.families import read_shape
from ptl_rl.pruning.live import NoCutFits, whole_plan
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.texts import texts_of
from ptl_rl.recovery.in_place.cuts import GOVERNOR, IN_CHECKPOINT, CutRecord, Cuts, as_it_was_cut
from ptl_rl.recovery.in_place.shapes import Shapes, mark_whole, seconds_saved, with_shapes
from ptl_rl.stage import StageContext


class MakesCuts:
    """For a trainer; what it must have is declared here."""

    context: StageContext
    total_training_steps: int
    part: str
    """Folder of a checkpoint of verl's in which the policy is."""

    def begin_with(self, context: StageContext, started: float) -> None:
        """Take up a training.

        Args:
            context: of the stage, with what the training began with.
            started: by the monotonic clock, when this process began to start it.
        """
        self.started = started
        self.shapes = Shapes.load(context.spec.work)
        self.context = with_shapes(context)
        self.cuts = Cuts.of(context.config)
        self.start_seconds = math.inf
        """From the start of this trainer to its first step, without what a later start has not: see ``aside``."""
        self.aside = 0.0
        """Seconds of cuts and validations so far."""
        self.step_seconds: list[float] = []
        """Of the steps that this trainer has made, without what comes between them."""

    @property
    @abstractmethod
    def pruner(self) -> Any:
        """The group of workers, which have the methods of :class:`ptl_rl.recovery.in_place.worker.Cutting`."""

    @property
    @abstractmethod
    def steps_done(self) -> int:
        """Optimizer steps of the training, also by earlier attempts."""

    @abstractmethod
    def _step_folder(self) -> Path:
        """Of verl's checkpoint of the steps that are done."""

    @property
    def work(self) -> Path:
        return self.context.spec.work

    @property
    def _sliced(self) -> int:
        """How many of the cuts are sliced off; the others are zero."""
        return self.shapes.cuts

    def _step_begins(self) -> None:
        """Told before every step; the first time says how long a start takes."""
        if self.start_seconds == math.inf:
            self.start_seconds = time.monotonic() - self.started - self.aside

    def _check_can_slice(self) -> None:
        """Refuse before the first step what could be sliced at no later one."""
        if self.context.config.schedule.rematerialise != "never":
            self.pruner.check_can_slice()

    def _let_rate_fall(self) -> None:
        """Where the recipe wants it, from the last cut on; at every start, as no checkpoint knows of it."""
        if self.context.recovery.learning_rate_schedule == AFTER_CUTS:
            self.pruner.decay_after(self.cuts.planned[-1].after_step, self.total_training_steps)

    @property
    def width(self) -> int:
        """Channels of every block that stand."""
        plans = self.cuts.plans
        return plans[-1].intermediate_size if plans else read_shape(self.context.spec.source).intermediate_size

    def _cut(self, cut: CutInPlace, rollouts: list[Sequence], step: int, max_damage: float | None = None) -> None:
        context, started = self.context, time.monotonic()
        records = context.data.worked_solutions()
        short = context.config.calibration.sequences - len(rollouts)
        # Each cut reads solutions of its own, as far as there are enough.
        first = len(self.cuts.made) * context.config.calibration.sequences % max(1, len(records) - short + 1)
        chosen = records[first : first + short]
        plan, facts = self.pruner.cut(
            context,
            rollouts,
            texts_of(chosen, context.config.prompt_suffix),
            texts_of(context.data.contrast(), ""),
            self.cuts.plans,
            self._sliced,
            cut.channels,
            cut.layers,
            subset_hash(chosen),
            max_damage,
        )[0]
        if plan is None:
            raise NoCutFits(facts["why"])
        facts["cut_seconds"] = time.monotonic() - started
        self.aside += facts["cut_seconds"]
        self.cuts.made.append(CutRecord(after_step=step, plan=plan, sliced=self._sliced, facts=facts))
        if context.config.evaluation.after_cut:
            self._keep_as_cut()

    def _keep_as_cut(self) -> None:
        """Write the policy as this cut leaves it, for the evaluation.

        A run ends with what its last cut has left, or the one before it. From an older checkpoint it may end with one
        before that.
        """
        number = len(self.cuts.made)
        shutil.rmtree(as_it_was_cut(self.work, number - 3), ignore_errors=True)
        folder = as_it_was_cut(self.work, number)
        folder.mkdir(parents=True, exist_ok=True)
        self.pruner.write_weights(folder)

    def _why_slice(self) -> str | None:
        """Why training is to go on with the sliced model; None: it goes on as it is."""
        when, left = self.context.config.schedule.rematerialise, self.total_training_steps - self.steps_done
        if when == "never" or left < 1 or len(self.cuts.made) == self._sliced:
            return None
        plan, now = self._plan, read_shape(self.context.spec.source)
        sliced = now.sliced(
            plan.source_intermediate_size - plan.intermediate_size, len(plan.keep_channels) - plan.num_hidden_layers
        )
        saved = seconds_saved(now, sliced, left, statistics.median(self.step_seconds[-5:]))
        if when == "when_it_pays" and saved <= self.start_seconds:
            return None
        return (
            f"after step {self.steps_done} training went on with {sliced.num_hidden_layers} blocks of "
            f"{sliced.intermediate_size} channels: {left} steps were to take about {saved:.0f} s less, and its start "
            f"took {self.start_seconds:.0f} s"
        )

    @property
    def _plan(self) -> PruningPlan:
        """Of all that is zero."""
        return whole_plan(self.cuts.plans[self._sliced :])

    def _leave_sliced(self, why: str) -> None:
        """Write a sliced model, and beside the checkpoint of this step one of it, from which training then goes on."""
        shapes = Shapes(cuts=len(self.cuts.made), why=[*self.shapes.why, why])
        old, model = self._step_folder(), self.work / shapes.source
        new = self.work / shapes.checkpoints / old.name
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(new.parent, ignore_errors=True)
        model.mkdir(parents=True)
        (new / self.part).mkdir(parents=True)
        self.pruner.write_sliced(self.context, self._plan, model, old / self.part, new / self.part)
        for path in (*old.glob("data*.pt"), old / IN_CHECKPOINT, old / GOVERNOR):
            if path.exists():
                shutil.copy2(path, new)
        mark_whole(new.parent, self.steps_done)
        shapes.save(self.work)
