"""From the trained policy, whose cut channels are zero, to the sliced checkpoint that a cycle ends with."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from ptl_rl.pruning.live import nothing_cut, whole_plan
from ptl_rl.pruning.slice.verify import check_difference
from ptl_rl.pruning.stages import worker_group
from ptl_rl.recovery.checkpoints import Checkpoints
from ptl_rl.recovery.follow import MetricsFollower
from ptl_rl.recovery.in_place.cuts import IN_CHECKPOINT, Cuts, as_it_was_cut
from ptl_rl.recovery.in_place.shapes import Shapes, checkpoints_of, verl_settings, with_shapes
from ptl_rl.recovery.rl.outcome import Outcome
from ptl_rl.stage import AFTER_CUT, StageContext


def outcome_of(context: StageContext, checkpoints: Checkpoints) -> Outcome | None:
    """What the training has ended with; None while it has not.

    Raises:
        CutsLost: nothing says what was cut.
    """
    if (outcome := Outcome.load(context.spec.work)) is not None:
        return outcome
    finished = checkpoints.are_finished()  # if not, what killed attempts have left half written goes
    if not finished or context.config.schedule.pace == "governed":
        return None
    cuts = Cuts.of(context.config)
    cuts.load(checkpoints.last / IN_CHECKPOINT)
    return Outcome(
        folder=str(checkpoints.final.relative_to(context.spec.work)),
        made=cuts.made,
        sliced=Shapes.load(context.spec.work).cuts,
        steps=context.spec.steps,
        why="",
    )


def train_in_place(
    context: StageContext,
    follower: MetricsFollower,
    train: Callable[[StageContext, MetricsFollower, dict], None],
    part: str = "",
) -> tuple[MetricsFollower, Outcome]:
    """Train to the end: in one go, or, where the policy is sliced on the way, once more each time.

    Args:
        follower: not yet started.
        train: is given the stage with the model to go on with, a follower, and verl keys beside those of the stage.
        part: folder of a checkpoint of verl's in which the policy is.

    Returns:
        The follower that has seen all of it, and what training has ended with.

    Raises:
        RuntimeError: verl came back without having finished.
    """
    while (outcome := outcome_of(context, checkpoints_of(context, part))) is None:
        before = Shapes.load(context.spec.work)
        train(with_shapes(context), follower, verl_settings(context))
        if Shapes.load(context.spec.work) == before:
            outcome = outcome_of(context, checkpoints_of(context, part))
            if outcome is None:
                raise RuntimeError(
                    f"{context.spec.work}: verl's trainer ended without making all of {context.spec.steps} steps"
                )
            break
        ray.shutdown()  # with this process's job ends all that verl has started for training
        context.report(-1, -1)
        context.wait_for_workers()
        follower = follower.again()
    return follower, outcome


def slice_trained(context: StageContext, outcome: Outcome) -> dict[str, Any]:
    """Write the sliced checkpoint and ``plan.json`` into the stage's folder, and hold it against the trained policy.

    Where the evaluation wants the cut model before its recovery, too, that is sliced into a folder of its own.

    Returns:
        What the journal says of the cuts.

    Raises:
        ExportError: the logits differ by more than float32 rounding.
    """
    spec, trained = context.spec, context.spec.work / outcome.folder
    plans = [record.plan for record in outcome.made]
    left = whole_plan(plans[outcome.sliced :]) if plans[outcome.sliced :] else nothing_cut(trained)
    plan = whole_plan(plans) if plans else left
    ray.shutdown()  # with this process's job ends all that verl has started for training, and holds GPUs
    context.connect_ray()
    # Tensors that are written are no steps of the training, so that progress is told elsewhere.
    changed = {"source": trained, "progress": spec.work / "slice.progress.jsonl"}
    context.report(-1, -1)  # a sign of life for the watchdog, here and below
    workers = worker_group(replace(context, spec=spec.model_copy(update=changed)))
    workers.slice(left)
    context.report(-1, -1)
    plan.save(spec.out / "plan.json")
    # Held against the policy as it is, with nothing masked: what was cut must have stayed at zero.
    layers = list(range(len(left.keep_channels)))
    everything = {
        "keep_channels": [list(range(left.source_intermediate_size))] * len(layers),
        "keep_layers": layers,
        "layer_order": [],
    }
    texts = [record.question + "\n" + record.solution for record in context.data.worked_solutions()[:4]]
    differences = workers.verify(left.model_copy(update=everything), texts)
    for difference in differences:
        check_difference(difference, spec.out)
    notes = [*Shapes.load(spec.work).why, *([outcome.why] if outcome.why else [])]
    if context.config.evaluation.after_cut and outcome.made:
        context.report(-1, -1)
        as_cut = as_it_was_cut(spec.work, len(outcome.made))
        if as_cut.exists():
            (spec.out / AFTER_CUT).mkdir()
            workers.slice(whole_plan(plans[outcome.made[-1].sliced :]), as_cut, spec.out / AFTER_CUT)
        else:
            notes.append(f"the model right after its last cut is gone ({as_cut}), so the evaluation leaves it out")
    return {
        "cuts": [{"after_step": record.after_step, **record.facts} for record in outcome.made],
        "steps": outcome.steps,
        "learns": outcome.learns,
        "intermediate_size": plan.intermediate_size,
        "num_hidden_layers": plan.num_hidden_layers,
        "logit_difference": max(differences),
        "notes": notes,
    }
