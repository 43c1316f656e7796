"""The stages ``score`` and ``slice``: start the pruning workers, have them work, write the plan."""

from safetensors.torch import load_file

from ptl_rl.data.corpora import Record, load_corpus
from ptl_rl.data.partition import partition, subset_hash
from ptl_rl.pruning.plan import PruningPlan, choose
from ptl_rl.stage import StageContext


class ExportError(RuntimeError):
    """The written checkpoint does not compute what the masked model computes."""


def subset_records(context: StageContext) -> list[Record]:
    """The records of this cycle's own subset of the training data."""
    config, spec = context.config, context.spec
    corpus = load_corpus(config.data.train, config.seed, config.data.max_bad_fraction)
    return partition(corpus.records, spec.subsets)[spec.subset]


def _worker_group(context: StageContext):
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    from ptl_rl.pruning.worker import PruningWorker

    resources = context.config.resources
    pool = RayResourcePool([resources.workers_per_node] * resources.nodes, use_gpu=True, max_colocate_count=1)
    remote = RayClassWithInitArgs(ray.remote(PruningWorker), context)
    return RayWorkerGroup(pool, remote, device_name=context.spec.device)


def score(context: StageContext) -> dict:
    """Write ``scores.safetensors`` (``importance_LC``, ``block_influence_L``) from this cycle's sequences."""
    context.connect_ray()
    records = subset_records(context)
    calibration = records[: context.config.calibration.sequences]
    workers = _worker_group(context)
    metrics = workers.score(calibration)[0]
    return {**metrics, "subset_hash": subset_hash(records), "peak_memory_gib": max(workers.peak_memory_gib())}


def _compensate(workers, plan: PruningPlan, calibration: list[Record]) -> dict:
    """Mean share of the FFN outputs that the cut loses, over blocks, without and with compensation."""
    if plan.compensate == "none":
        return {}
    errors: dict[int, tuple[float, float]] = {}
    for of_rank in workers.compensate(plan, calibration):
        errors |= of_rank
    plain, left = zip(*errors.values(), strict=True)
    return {"output_error_plain": sum(plain) / len(plain), "output_error": sum(left) / len(left)}


def slice(context: StageContext) -> dict:
    """Choose what stays, write ``plan.json`` and the sliced checkpoint, and hold it against the masked original.

    Raises:
        ExportError: the logits differ by more than float32 rounding.
    """
    from ptl_rl.pruning.worker import EXPORT_TOLERANCE

    spec, config = context.spec, context.config
    assert spec.scores is not None
    scores = load_file(spec.scores / "scores.safetensors")
    keep_channels, keep_layers = choose(
        scores["importance_LC"],
        scores["block_influence_L"],
        remove_channels=spec.remove_channels,
        remove_layers=spec.remove_layers,
    )
    records = subset_records(context)
    plan = PruningPlan(
        keep_channels=keep_channels,
        keep_layers=keep_layers,
        source_intermediate_size=scores["importance_LC"].shape[1],
        alignment=spec.alignment,
        channel_criterion=config.criterion.channels,
        layer_criterion=config.criterion.layers,
        compensate=config.criterion.compensate if spec.remove_channels else "none",
        ridge=config.criterion.ridge,
        subset_hash=subset_hash(records),
        source=str(spec.source),
    )
    context.connect_ray()
    workers = _worker_group(context)
    errors = _compensate(workers, plan, records[: config.calibration.sequences])
    workers.slice(plan)
    plan.save(spec.out / "plan.json")
    difference = max(workers.verify(plan, [r.question + "\n" + r.solution for r in records[:4]]))
    if not difference <= EXPORT_TOLERANCE:
        raise ExportError(
            f"{spec.out}: logits differ from the masked model's by {difference:.2e} of the largest logit (at most "
            f"{EXPORT_TOLERANCE:g} is rounding); a bug of the family adapter; the run stops before it trains on it"
        )
    return {
        "intermediate_size": plan.intermediate_size,
        "num_hidden_layers": plan.num_hidden_layers,
        **errors,
        "logit_difference": difference,
        "peak_memory_gib": max(workers.peak_memory_gib()),
    }
