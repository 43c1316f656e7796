"""verl's synchronous trainer, which cuts the policy at the end of a step.

A cut comes before verl saves and before the weights go to vLLM, so rollouts of the next step are the cut policy's, and
a checkpoint of the step holds it with all that was cut so far. Each cut is followed by a checkpoint, and is told to the
driver only then: what the journal names is never made again.
"""

import time
from pathlib import Path
from typing import Any

import transfer_queue as tq
from verl.trainer.ppo.v1 import register_trainer
from verl.utils.debug import marked_timer

from ptl_rl.config.in_place import CutInPlace
from ptl_rl.data.encoding import Sequence
from ptl_rl.pruning.live import rollout_sequences
from ptl_rl.recovery.in_place.cuts import IN_CHECKPOINT, CutRecord, publish
from ptl_rl.recovery.in_place.making import MakesCuts
from ptl_rl.recovery.in_place.worker import PruningActor
from ptl_rl.recovery.rl import FIXED
from ptl_rl.recovery.rl.watched import WatchedTrainer

WIDTH = "pruning/intermediate_size"
"""verl's metric of a step: channels of every block that its rollouts were made with."""
DAMAGE = "pruning/damage"
"""verl's metric of a step: what the cut before it has raised the loss by, in nats a token."""


@register_trainer(FIXED)
class InPlaceTrainer(MakesCuts, WatchedTrainer):
    """One training with the cuts of ``schedule``."""

    worker = PruningActor
    part = "actor"

    def __init__(self, config) -> None:
        started = time.monotonic()
        super().__init__(config)
        self.begin_with(self.context, started)
        self.saved_step: int | None = None

    @property
    def pruner(self) -> Any:
        return self.actor_rollout_wg

    @property
    def steps_done(self) -> int:
        return self.global_steps

    @property
    def may_end(self) -> bool:
        """Not while cuts are still to come: a policy that has nothing more to learn is cut next."""
        return len(self.cuts.made) >= len(self.cuts.planned)

    @property
    def _made(self) -> list[CutRecord]:
        return self.cuts.made

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            self.cuts.load(self._step_folder() / IN_CHECKPOINT)
            publish(self.context.spec.cuts, self.cuts.made)

    def _step_folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"

    def _save_checkpoint(self) -> None:
        if self.saved_step == self.global_steps:  # right after a cut
            return
        self._write_state()  # before verl names the checkpoint as whole
        super()._save_checkpoint()
        self.saved_step = self.global_steps

    def _write_state(self) -> None:
        self.cuts.save(self._step_folder() / IN_CHECKPOINT)

    def on_train_begin(self) -> None:
        """Make the first cut, which no step comes before: on worked solutions, as there are no rollouts yet."""
        super().on_train_begin()
        self._check_can_slice()
        self._let_rate_fall()
        if (cut := self.cuts.due(self.global_steps - 1)) is not None:
            self.checkpoint_manager.sleep_replicas()
            self._cut(cut, [], self.global_steps - 1)
            publish(self.context.spec.cuts, self.cuts.made)
            self.checkpoint_manager.update_weights(self.global_steps)

    def _validate(self) -> dict[str, float]:
        began = time.monotonic()
        found = super()._validate()
        self.aside += time.monotonic() - began
        return found

    def step(self, metrics: dict, timing_raw: dict) -> Any:
        width, began = self.width, time.monotonic()
        self._step_begins()
        batch = super().step(metrics, timing_raw)
        self.step_seconds.append(time.monotonic() - began)
        metrics[WIDTH] = width
        if self.cuts.made:
            facts = self.cuts.made[-1].facts
            metrics[DAMAGE] = facts["loss_after"] - facts["loss_before"]
        if (cut := self.cuts.due(self.global_steps)) is not None:
            with marked_timer("cut", timing_raw, color="yellow"):
                self._cut(cut, self._rollouts(batch), self.global_steps)
            with marked_timer("save_cut", timing_raw, color="green"):
                self._save_checkpoint()
            publish(self.context.spec.cuts, self.cuts.made)
        return batch

    def on_step_end(self) -> None:
        super().on_step_end()
        self.govern()
        if not self.ended and (why := self._why_slice()) is not None:
            self._go_on_sliced(why)

    def _go_on_sliced(self, why: str) -> None:
        """Leave a sliced model, and a checkpoint of it to go on from, and make this step this trainer's last."""
        if self.saved_step != self.global_steps:
            self._save_now()
        self.checkpoint_manager.sleep_replicas()
        self._leave_sliced(why)
        self._make_last()

    def govern(self) -> None:
        """Decide, at the end of a step, what comes next; here the schedule has decided it."""

    def _save_now(self) -> None:
        self._save_checkpoint()

    def _rollouts(self, batch) -> list[Sequence]:
        """Of the step that was just made, those that are worth scoring on; none where the recipe wants none."""
        config = self.context.config
        wanted = {"corpus": 0, "both": config.calibration.sequences // 2}.get(
            config.calibration.source, config.calibration.sequences
        )
        if not wanted:
            return []
        fields = ["prompts", "responses", "rm_scores"]
        data = tq.kv_batch_get(keys=self._own_keys(batch), partition_id=batch.partition_id, select_fields=fields)
        prompts, responses = ([ids.tolist() for ids in data[name].unbind()] for name in ("prompts", "responses"))
        rewards = [float(scores.sum()) for scores in data["rm_scores"].unbind()]
        return rollout_sequences(prompts, responses, rewards, config.data.max_response_tokens, wanted)

    def _cut(self, cut: CutInPlace, rollouts: list[Sequence], step: int, max_damage: float | None = None) -> None:
        super()._cut(cut, rollouts, step, max_damage)
        self.learnable.begin_anew()
