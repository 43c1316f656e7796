"""verl's synchronous trainer, which ends once rewards teach nothing any more."""

from pathlib import Path
from typing import Any, ClassVar

import ray
import transfer_queue as tq
from omegaconf import open_dict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from ptl_rl.recovery.rl import SPEC, WATCHED
from ptl_rl.recovery.rl.learnable import Learnable, learnable_fraction
from ptl_rl.recovery.rl.outcome import LEFT_BY_TRAINING, Outcome
from ptl_rl.recovery.rl.worker import PolicyWorker
from ptl_rl.stage import StageContext, load_context

LEARNABLE = "pruning/learnable_fraction"
"""verl's metric of a step: share of its prompts whose answers earned different rewards."""


@register_trainer(WATCHED)
class WatchedTrainer(PPOTrainerSync):
    """One training by rewards, without cuts."""

    worker: ClassVar[type[PolicyWorker]] = PolicyWorker
    """Of policy and rollouts."""

    def __init__(self, config) -> None:
        self.context: StageContext = load_context(Path(config.trainer[SPEC]))
        recovery: Any = self.context.recovery
        self.has_groups: bool = recovery.learns_from_groups
        self.learnable = Learnable(recovery.min_learnable_fraction, recovery.learnable_patience)
        self.ended = False
        with open_dict(config):  # verl asks by name whether the buffer is a synchronous trainer's
            config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)

    @property
    def work(self) -> Path:
        return self.context.spec.work

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(self.worker)

    def step(self, metrics: dict, timing_raw: dict) -> Any:
        batch = super().step(metrics, timing_raw)
        if self.has_groups:
            self._watch(batch, metrics)
        return batch

    def _watch(self, batch, metrics: dict) -> None:
        keys = self._own_keys(batch)
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
        rewards = [float(scores.sum()) for scores in data["rm_scores"].unbind()]
        prompts = [key.rsplit("_", 2)[0] for key in keys]
        metrics[LEARNABLE] = learnable_fraction(zip(prompts, rewards, strict=True))
        self.learnable.saw(metrics[LEARNABLE], sum(rewards) / len(rewards))

    @staticmethod
    def _own_keys(batch) -> list[str]:
        """Of a step's answers, without those that only fill the batch up."""
        return [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]

    def on_step_end(self) -> None:
        super().on_step_end()
        if self.may_end and self.learnable.why is not None and not self.ended:  # also after the last step: it says why
            self._end(self.learnable.why)

    @property
    def may_end(self) -> bool:
        """Whether a training whose rewards teach nothing has nothing else to come."""
        return True

    def _end(self, why: str) -> None:
        """Make this step the last, and leave the policy and the reason for what comes after the training."""
        said = f"ended after step {self.global_steps} of {self.total_training_steps}: {why}"
        last = self._written("last")
        ended = {"made": self._made, "sliced": self._sliced, "steps": self.global_steps}
        Outcome(folder=last, why=said, learns=False, **ended).save(self.work)
        self._make_last()

    def _make_last(self) -> None:
        self.ended, self.total_training_steps = True, self.global_steps

    @property
    def _made(self) -> list:
        """Cuts that are in the policy."""
        return []

    @property
    def _sliced(self) -> int:
        """Of these, sliced off."""
        return 0

    def _written(self, name: str) -> str:
        """Write the policy into a folder of its own; gives the folder, relative to the work folder."""
        self._write(self.work / LEFT_BY_TRAINING / name)
        return f"{LEFT_BY_TRAINING}/{name}"

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.actor_rollout_wg.write_weights(folder)
