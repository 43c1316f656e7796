"""One RL training in which channels are cut between two steps: ``schedule.mode: in_place``.

``cuts`` says what is cut after which step and what a checkpoint must know of it; ``trainer`` is verl's synchronous
trainer with a cut at the end of a step; ``worker`` is verl's worker with a method that cuts the live policy.
"""

FIXED, GOVERNED = "ptl_in_place", "ptl_governed"
"""The two trainers' names in ``trainer.v1.trainer_mode``."""
