"""verl's worker of policy and rollouts, which can also write the policy at any step."""

from pathlib import Path

from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker


class PolicyWorker(ActorRolloutRefWorker):
    """Runs on every rank."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def write_weights(self, folder: Path) -> None:
        """Write the policy as an ordinary Hugging Face checkpoint, with the shapes that it has in training."""
        self.actor.engine.checkpoint_manager.write_shards(folder)
