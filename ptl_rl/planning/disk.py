"""What a run writes to disk: checkpoints of every cycle, which stay, and verl's own while a recovery is at work.

A sliced checkpoint has the type of what it was cut from: the original's in the first cycle, then float32, as a
recovered policy is written. With ``save_every_steps`` verl keeps two checkpoints at most, each with shards of the
weights and AdamW's state; after the last step it writes the Hugging Face folder alone, which becomes the recovered one.
"""

from dataclasses import dataclass

from ptl_rl.config import AnyRecovery, GrpoConfig, RunConfig
from ptl_rl.families import ModelShape
from ptl_rl.planning.schedule import planned_cuts, recovery_steps

WEIGHT_BYTES = 4
RESUMABLE_BYTES = 12
"""Per parameter, of a checkpoint from which verl goes on: weights and two moments, float32."""
KEPT = 2
"""Of those, at most, the one that is being written included."""
ROLLOUT_TOKEN_BYTES = 10
"""Of a response's text as verl writes it, where scoring is to read it."""


@dataclass(frozen=True)
class DiskUse:
    """Bytes in the run's folder."""

    kept: float
    """Once the run is done."""
    peak: float
    """At most, while it is at work."""
    extension: float
    """Of another round of the largest recovery, or of what is for dead rewards, where the gate asks for one; in neither
    of the others."""
    resumable: float
    """Of the largest checkpoint within a recovery; 0 where none is written."""


def saves(recovery: AnyRecovery, steps: int, in_place: bool = False) -> int:
    """How many checkpoints verl writes from which it could go on, those after cuts in place apart, but for one."""
    every = recovery.save_every_steps
    return (steps - 1) // every if every else int(in_place)


def recovery_peak(shape: ModelShape, recovery: AnyRecovery, steps: int, in_place: bool = False) -> float:
    """Bytes of verl's folder at its fullest; in place, with the weights from which the sliced ones are cut."""
    written = max(saves(recovery, steps), KEPT) if in_place else saves(recovery, steps)
    resumable = RESUMABLE_BYTES * shape.parameters
    last = WEIGHT_BYTES * shape.parameters
    return max(min(written, KEPT) * resumable, min(written, KEPT - 1) * resumable + last)


def rollout_bytes(config: RunConfig, recovery: AnyRecovery, steps: int) -> float:
    """Of responses that are kept for scoring."""
    if config.calibration.source == "corpus" or not isinstance(recovery, GrpoConfig):
        return 0.0
    responses = steps * recovery.prompts_per_step * recovery.rollouts_per_prompt
    return float(ROLLOUT_TOKEN_BYTES * responses * config.data.max_response_tokens)


def models_beside(config: RunConfig) -> int:
    """How many models a training in place writes beside its checkpoints, of the width that it trains, at most.

    Those that it may end with: two of a governed one, else that of an early end; and the last three as they were cut.
    """
    schedule = config.schedule
    if schedule.mode != "in_place":
        return 0
    as_cut = min(3, len(schedule.cuts_in_order) if schedule.pace != "governed" else 3)
    return (2 if schedule.pace == "governed" else 1) + (as_cut if config.evaluation.after_cut else 0)


def rematerialised(config: RunConfig, shape: ModelShape) -> float:
    """Bytes of a sliced model and its first checkpoint, while those that it is sliced from are still there."""
    schedule = config.schedule
    if schedule.rematerialise == "never":
        return 0.0
    first = (0, 0) if schedule.pace == "governed" else schedule.cuts_in_order[0]
    return float((RESUMABLE_BYTES + WEIGHT_BYTES) * shape.sliced(*first).parameters)


def disk_use(config: RunConfig, shape: ModelShape, source_bytes: int) -> DiskUse:
    """Of the run as planned.

    Args:
        shape: the original's.
        source_bytes: of each of its weights on disk.
    """
    kept = peak = largest = resumable = 0.0
    width = source_bytes
    for cut in planned_cuts(config.schedule):
        before, shape = shape, shape.sliced(cut.channels, cut.layers)
        in_place = config.schedule.mode == "in_place"
        trained = before if in_place else shape
        if not cut.is_empty and not in_place:
            new_weights = 0.0
            if config.criterion.compensate != "none":
                projections = before.intermediate_size + before.num_attention_heads * before.head_dim
                new_weights = 4.0 * before.num_hidden_layers * before.hidden_size * projections
            kept += width * shape.parameters
            peak = max(peak, kept + new_weights)
        width = WEIGHT_BYTES
        of_cycle = 0.0
        for part, recovery in enumerate(config.recoveries(cut.planned)):
            steps = recovery_steps(config, cut.planned, part)
            rollouts = rollout_bytes(config, recovery, steps)
            written = float(models_beside(config) * WEIGHT_BYTES * trained.parameters)
            as_cut = in_place and not cut.is_empty and config.evaluation.after_cut
            left = WEIGHT_BYTES * shape.parameters * (1 + as_cut)
            if in_place:  # what is left is sliced from what training has written
                written += left + rematerialised(config, before)
            peak = max(peak, kept + rollouts + written + recovery_peak(trained, recovery, steps, in_place))
            kept += left
            of_cycle += WEIGHT_BYTES * shape.parameters
            if saves(recovery, steps, in_place):
                resumable = max(resumable, RESUMABLE_BYTES * trained.parameters)
        largest = max(largest, of_cycle)
        peak = max(peak, kept)
    # Where rewards teach nothing, what is for that follows once a cycle; the largest cycle's is counted.
    rescue = largest / max(1, len(config.recovery)) * len(config.recovery_if_unlearnable)
    return DiskUse(kept, peak, max(largest if config.gate.max_extensions else 0.0, rescue), resumable)
