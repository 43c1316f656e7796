"""verl's SFT trainer, which cuts the model between two of its steps.

It asks its data loader for the next batch once a step is done, and that is where the cuts come: after the step, before
anything of the next one. A cut is followed by a checkpoint and told to the driver only then, as in the RL trainer.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from verl.trainer import sft_trainer_ray

from ptl_rl.recovery.in_place.cuts import IN_CHECKPOINT, publish
from ptl_rl.recovery.in_place.making import MakesCuts
from ptl_rl.recovery.in_place.worker import PruningTrainer
from ptl_rl.recovery.parent import ParentLoss
from ptl_rl.recovery.trainer import SequenceTrainer
from ptl_rl.stage import StageContext


class BetweenSteps:
    """A data loader's batches; something is done before each is read.

    Args:
        before: gives whether there is to be another batch.
        after: called once the step that a batch was read for is done.
    """

    def __init__(self, batches: Any, before: Callable[[], bool], after: Callable[[], None]) -> None:
        self.batches, self.before, self.after = batches, before, after

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        found = iter(self.batches)
        while self.before():
            try:
                batch = next(found)
            except StopIteration:
                return
            yield batch
            self.after()


class CuttingSequenceTrainer(MakesCuts, SequenceTrainer):
    """One training with the cuts of ``schedule``.

    Args:
        context: of the stage, with what the training began with.
        parent_loss: takes the place of verl's loss.
    """

    part = ""

    def __init__(self, config, context: StageContext, parent_loss: ParentLoss | None = None) -> None:
        self.begin_with(context, time.monotonic())
        super().__init__(config, parent_loss)
        self.done, self.ended = self.resume_global_step, False
        self.saved_step: int | None = self.resume_global_step
        self.began: float | None = None
        self._check_can_slice()
        self._let_rate_fall()
        if self.done:
            self.cuts.load(self._step_folder() / IN_CHECKPOINT)
            publish(self.context.spec.cuts, self.cuts.made)
        self.train_dataloader = BetweenSteps(self.train_dataloader, self._before_step, self._after_step)

    @property
    def pruner(self) -> Any:
        return self.training_client

    @property
    def steps_done(self) -> int:
        return self.done

    def _step_folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{self.done}"

    def _build_engine(self) -> None:
        """verl names its worker class itself, so ours stands under that name meanwhile (verl 0.9)."""
        stock, sft_trainer_ray.TrainingWorker = sft_trainer_ray.TrainingWorker, PruningTrainer
        try:
            super()._build_engine()
        finally:
            sft_trainer_ray.TrainingWorker = stock

    def _build_ckpt_handler(self) -> None:
        super()._build_ckpt_handler()
        write = self.ckpt_handler.save_checkpoint

        def save(step: int) -> None:
            """verl asks for it before the cut that follows a step: it waits until that is made."""
            if step == self.saved_step or (step < self.total_training_steps and self.cuts.due(step) is not None):
                return
            self.cuts.save(Path(self.config.trainer.default_local_dir) / f"global_step_{step}" / IN_CHECKPOINT)
            write(step=step)
            self.saved_step = step

        self.ckpt_handler.save_checkpoint = save

    def _before_step(self) -> bool:
        if self.ended:
            return False
        if (cut := self.cuts.due(self.done)) is not None:
            self._cut(cut, [], self.done)
            self.saved_step = None  # what stands on disk has not this cut
            if self.done:
                self.ckpt_handler.save_checkpoint(step=self.done)
            publish(self.context.spec.cuts, self.cuts.made)
        if self.done and self.step_seconds and (why := self._why_slice()) is not None:
            self.ckpt_handler.save_checkpoint(step=self.done)
            self._leave_sliced(why)
            self.ended = True
            return False
        self.began = time.monotonic()
        self._step_begins()
        return True

    def _after_step(self) -> None:
        assert self.began is not None
        self.step_seconds.append(time.monotonic() - self.began)
        self.done += 1
