"""The stages ``score`` and ``slice``: start the pruning workers, have them work, write the plan."""

from collections.abc import Sequence

from safetensors.torch import load_file

from ptl_rl.data.corpora import Record
from ptl_rl.data.partition import partition, subset_hash
from ptl_rl.pruning.choose.choice import Scores, make_plan
from ptl_rl.pruning.engine import Losses
from ptl_rl.pruning.score.texts import calibration_texts, texts_of
from ptl_rl.pruning.slice.verify import check_difference
from ptl_rl.stage import StageContext


def subset_records(context: StageContext) -> Sequence[Record]:
    """The records of this cycle's own subset of what is scored on."""
    return partition(context.data.worked_solutions(), context.spec.subsets)[context.spec.subset]


def worker_group(context: StageContext):
    """A pruning worker on every rank of the run's Ray, which waits for them to be free."""
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    from ptl_rl.pruning.worker import PruningWorker

    resources = context.config.resources
    pool = RayResourcePool([resources.workers_per_node] * resources.nodes, use_gpu=True, max_colocate_count=1)
    remote = RayClassWithInitArgs(ray.remote(PruningWorker), context)
    return RayWorkerGroup(pool, remote, device_name=context.spec.device)


def score(context: StageContext) -> dict:
    """Write ``scores.safetensors`` (see :class:`ptl_rl.pruning.engine.Scores`) from this cycle's sequences."""
    context.connect_ray()
    records = subset_records(context)
    texts = calibration_texts(context.config, context.spec, records)
    general = texts_of(context.data.contrast(), "")
    workers = worker_group(context)
    metrics = workers.score(texts, general)[0]
    return {
        **metrics,
        "calibration_rollouts": texts.rollouts,
        "subset_hash": subset_hash(records),
        "peak_memory_gib": max(workers.peak_memory_gib()),
    }


def slice(context: StageContext) -> dict:
    """Choose what stays, write ``plan.json`` and the sliced checkpoint, and hold it against the masked original.

    Raises:
        ExportError: the logits differ by more than float32 rounding.
    """
    spec, config = context.spec, context.config
    assert spec.scores is not None
    records = subset_records(context)
    plan = make_plan(
        Scores.of(load_file(spec.scores / "scores.safetensors")),
        config.criterion,
        remove_channels=spec.remove_channels,
        alignment=spec.alignment,
        subset_hash=subset_hash(records),
        source=spec.source,
    )
    context.connect_ray()
    workers = worker_group(context)
    losses = Losses()
    if plan.compensate != "none":
        losses = workers.compensate(plan, calibration_texts(config, spec, records))[0]
    workers.slice(plan)
    plan.save(spec.out / "plan.json")
    differences = workers.verify(plan, [r.question + "\n" + r.solution for r in records[:4]])
    for difference in differences:  # one by one: the largest of numbers and NaN may be a number
        check_difference(difference, spec.out)
    return {
        "intermediate_size": plan.intermediate_size,
        "num_hidden_layers": plan.num_hidden_layers,
        "output_error_plain": losses.channels_plain,
        "output_error": losses.channels,
        "stream_error": losses.stream,
        "notes": plan.notes,
        "logit_difference": max(differences),
        "peak_memory_gib": max(workers.peak_memory_gib()),
    }
