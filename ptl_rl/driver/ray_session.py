"""The one Ray session of a run: started here on a single machine, joined where one is running (``ray job submit``)."""

import os
import time

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.recovery.settings import DistillConfig


class RaySession:
    """Context manager; ``address`` is what stage processes join."""

    def __init__(self, config: RunConfig, device: str) -> None:
        self.config, self.device = config, device
        self.address = ""
        self.started_here = False

    def __enter__(self) -> "RaySession":
        import ray

        resources, workers = self.config.resources, self.workers
        self.started_here = not os.environ.get("RAY_ADDRESS")
        if self.started_here:
            logical = {"num_cpus": resources.ray_cpus} if self.device == "cpu" else {}
            ray.init(
                address="local",  # another user's Ray on this machine is none of ours
                num_gpus=workers if self.device == "cpu" else None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                **logical,
            )
        else:
            ray.init(log_to_driver=False, logging_level="ERROR")
        self.address = ray.get_runtime_context().gcs_address
        gpus = ray.cluster_resources().get("GPU", 0)
        if gpus < workers:
            remedy = (
                f"ray start --head --num-gpus={workers} --num-cpus={resources.ray_cpus} (logical on CPU)"
                if self.device == "cpu"
                else "add nodes, or lower resources.nodes or resources.workers_per_node"
            )
            self.__exit__()
            raise ConfigError(f"resources: the recipe wants {workers} workers, but Ray has {gpus:g} GPUs; {remedy}")
        return self

    @property
    def workers(self) -> int:
        """GPUs that the run uses at most, logical ones on CPU: there, a parent that teaches has workers of its own."""
        resources = self.config.resources
        teachers = [r.teacher_workers_per_node for r in self.config.all_recoveries if isinstance(r, DistillConfig)]
        extra = max(teachers, default=0) if self.device == "cpu" else 0
        return resources.nodes * (resources.workers_per_node + extra)

    def wait_for_workers(self, seconds: float = 60) -> bool:
        """Wait until every GPU that the run uses is free again; False if some are still held."""
        import ray

        deadline = time.monotonic() + seconds
        while ray.available_resources().get("GPU", 0) < self.workers:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()
