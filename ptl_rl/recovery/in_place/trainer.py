"""verl's synchronous trainer, which cuts the policy at the end of a step.

A cut comes before verl saves and before the weights go to vLLM, so rollouts of the next step are the cut policy's, and
a checkpoint of the step holds it with all that was cut so far. Each cut is followed by a checkpoint, and is told to the
driver only then: what the journal names is never made again.
"""

import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import transfer_queue as tq
from verl.trainer.ppo.v1 import register_trainer
from verl.utils.debug import marked_timer

from ptl_rl.config.in_place import CutInPlace
from ptl_rl.config.recovery import AFTER_CUTS
from ptl_rl.data.encoding import Sequence
from ptl_rl.data.partition import subset_hash
from ptl_rl.families import read_shape
from ptl_rl.pruning.live import NoCutFits, rollout_sequences, whole_plan
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.texts import texts_of
from ptl_rl.recovery.in_place.cuts import IN_CHECKPOINT, CutRecord, Cuts, as_it_was_cut, publish
from ptl_rl.recovery.in_place.shapes import Shapes, mark_whole, seconds_saved, with_shapes
from ptl_rl.recovery.in_place.worker import PruningActor
from ptl_rl.recovery.rl import FIXED
from ptl_rl.recovery.rl.watched import WatchedTrainer

WIDTH = "pruning/intermediate_size"
"""verl's metric of a step: channels of every block that its rollouts were made with."""
DAMAGE = "pruning/damage"
"""verl's metric of a step: what the cut before it has raised the loss by, in nats a token."""


@register_trainer(FIXED)
class InPlaceTrainer(WatchedTrainer):
    """One training with the cuts of ``schedule``."""

    worker = PruningActor

    def __init__(self, config) -> None:
        self.started = time.monotonic()
        super().__init__(config)
        self.shapes = Shapes.load(self.work)
        self.context = with_shapes(self.context)
        self.cuts = Cuts.of(self.context.config)
        self.saved_step: int | None = None
        self.start_seconds = math.inf
        """From the start of this trainer to its first step."""
        self.step_seconds: list[float] = []

    @property
    def may_end(self) -> bool:
        """Not while cuts are still to come: a policy that has nothing more to learn is cut next."""
        return len(self.cuts.made) >= len(self.cuts.planned)

    @property
    def _made(self) -> list[CutRecord]:
        return self.cuts.made

    @property
    def _sliced(self) -> int:
        return self.shapes.cuts

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
        if self.context.recovery.learning_rate_schedule == AFTER_CUTS:
            self.actor_rollout_wg.decay_after(self.cuts.planned[-1].after_step, self.total_training_steps)
        if (cut := self.cuts.due(self.global_steps - 1)) is not None:
            self.checkpoint_manager.sleep_replicas()
            self._cut(cut, [], self.global_steps - 1)
            publish(self.context.spec.cuts, self.cuts.made)
            self.checkpoint_manager.update_weights(self.global_steps)

    def step(self, metrics: dict, timing_raw: dict) -> Any:
        width, began = self.width, time.monotonic()
        self.start_seconds = min(self.start_seconds, began - self.started)
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

    def govern(self) -> None:
        """Decide, at the end of a step, what comes next; here the schedule has decided it."""

    def _why_slice(self) -> str | None:
        """Why training is to go on with the sliced model; None: it goes on as it is."""
        when, left = self.context.config.schedule.rematerialise, self.total_training_steps - self.global_steps
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
            f"after step {self.global_steps} training went on with {sliced.num_hidden_layers} blocks of "
            f"{sliced.intermediate_size} channels: {left} steps were to take about {saved:.0f} s less, and its start "
            f"took {self.start_seconds:.0f} s"
        )

    @property
    def _plan(self) -> PruningPlan:
        """Of all that is zero."""
        return whole_plan(self.cuts.plans[self._sliced :])

    def _go_on_sliced(self, why: str) -> None:
        """Leave a sliced model, and a checkpoint of it to go on from, and make this step this trainer's last."""
        if self.saved_step != self.global_steps:
            self._save_now()
        self.checkpoint_manager.sleep_replicas()
        shapes = Shapes(cuts=len(self.cuts.made), why=[*self.shapes.why, why])
        old, model = self._step_folder(), self.work / shapes.source
        new = self.work / shapes.checkpoints / old.name
        for folder in (model, new / "actor"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.actor_rollout_wg.write_sliced(self.context, self._plan, model, old / "actor", new / "actor")
        for path in old.iterdir():
            if path.is_file():
                shutil.copy2(path, new)
        mark_whole(new.parent, self.global_steps)
        shapes.save(self.work)
        self._make_last()

    def _save_now(self) -> None:
        self._save_checkpoint()

    @property
    def width(self) -> int:
        """Channels of every block that stand."""
        plans = self.cuts.plans
        return plans[-1].intermediate_size if plans else read_shape(self.context.spec.source).intermediate_size

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
        context, started = self.context, time.monotonic()
        records = context.data.worked_solutions()
        short = context.config.calibration.sequences - len(rollouts)
        # Each cut reads solutions of its own, as far as there are enough.
        first = len(self.cuts.made) * context.config.calibration.sequences % max(1, len(records) - short + 1)
        chosen = records[first : first + short]
        plan, facts = self.actor_rollout_wg.cut(
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
        self.cuts.made.append(CutRecord(after_step=step, plan=plan, sliced=self._sliced, facts=facts))
        self.learnable.begin_anew()
        if context.config.evaluation.after_cut:
            self._keep_as_cut()

    def _keep_as_cut(self) -> None:
        """Write the policy as this cut leaves it, for the evaluation.

        A run ends with what its last cut has left, or the one before it. From an older checkpoint it may end with one
        before that.
        """
        number = len(self.cuts.made)
        shutil.rmtree(as_it_was_cut(self.work, number - 3), ignore_errors=True)
        self._write(as_it_was_cut(self.work, number))
