"""verl's task runner, in whose process the trainers must be registered before verl asks for one by name."""

import ray
from verl.trainer.main_ppo import TaskRunnerV1


@ray.remote
class Runner(TaskRunnerV1.__ray_actor_class__):
    """As verl's."""

    def run(self, config) -> None:
        """Ray carries this class to the process by value, so nothing but this imports the trainers there."""
        import ptl_rl.recovery.in_place.governed  # noqa: F401

        super().run(config)
