"""A replay buffer that notices finished rollouts at once.

verl 0.9's looks every two seconds, which is nothing beside minutes of generation on GPUs, but up to half of a step of
the tiny models that run on CPUs. verl has a setting for the class (``trainer.v1.sampler.custom_sampler``), none for the
interval.
"""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

POLL_SECONDS = 0.1


class QuickReplayBuffer(ReplayBuffer):
    """verl's own synchronous buffer, polled every :data:`POLL_SECONDS`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"poll_interval": POLL_SECONDS, **kwargs})
