"""verl's worker of policy and rollouts, which can write the policy at any step and hold it to the unpruned parent."""

from abc import abstractmethod
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig, MtpConfig, TrainingWorkerConfig
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from ptl_rl.config.verl_keys import PARENT


def _reference(model: HFModelConfig, config: TrainingWorkerConfig) -> TrainingWorker:
    """verl's reference policy, of ``model`` in place of the policy's own start."""
    return TrainingWorker(config=replace(config, model_config=model))


class WritesPolicy:
    """For a worker of verl's that trains; its methods run on every rank, and are collective."""

    @property
    @abstractmethod
    def policy(self) -> Any:
        """verl's engine of what is trained."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def write_weights(self, folder: Path) -> None:
        """Write the policy as an ordinary Hugging Face checkpoint, with the shapes that it has in training."""
        with self.policy.eval_mode():  # as NCCL gathers nothing from host memory, offloaded weights come back for it
            self.policy.checkpoint_manager.write_shards(folder)


class PolicyWorker(WritesPolicy, ActorRolloutRefWorker):
    """Runs on every rank."""

    @property
    def policy(self) -> Any:
        return self.actor.engine

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Load as verl does; the reference policy is the parent where the settings name one."""
        if (parent := OmegaConf.select(self.config, PARENT.partition(".")[2])) is not None:
            model = omega_conf_to_dataclass(OmegaConf.merge(self.config.model, {"path": parent}))
            model.mtp = MtpConfig(enable=False)  # as verl has it for a reference
            self.ref_worker_cls = partial(_reference, model)
        super().init_model()
