"""What every RL training here adds to verl's: it watches whether rewards still teach, and can end before its last step.

``watched`` is verl's synchronous trainer with that, ``worker`` verl's worker that can write the policy at any step,
``runner`` has verl find both; trainings with cuts in them (:mod:`ptl_rl.recovery.in_place`) build on these.
"""

WATCHED, FIXED, GOVERNED = "ptl_watched", "ptl_in_place", "ptl_governed"
"""The trainers' names in ``trainer.v1.trainer_mode``: without cuts, with those of a schedule, at a pace of its own."""
SPEC = "ptl_rl_stage"
"""Key of verl's section ``trainer``: path of the stage's own file."""
