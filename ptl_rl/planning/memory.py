"""Memory of every phase of a cycle, on one GPU (or in one worker's processes on CPUs) and of a node's host."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ptl_rl.config import AnyRecovery, ConfigError, CptConfig, DistillConfig, GrpoConfig, RunConfig
from ptl_rl.config.recovery import micro_batch
from ptl_rl.families import ModelShape
from ptl_rl.planning.hardware import GIB, Device
from ptl_rl.planning.pruning_memory import Pruner
from ptl_rl.planning.schedule import Cut
from ptl_rl.planning.serving_memory import Engine
from ptl_rl.planning.trainer_memory import CHUNK_TOKENS, Parts, Rows, Trainer, total

GPU_RUNTIME_GIB = 2.0
"""Of each process on a GPU: CUDA's context, NCCL's buffers, cuBLAS's workspace, what the allocator cannot use."""
ASLEEP_GIB = 2.0
"""What vLLM keeps on the GPU while verl trains: its context and CUDA graphs; weights and cache are let go."""
HOST_PROCESS_GIB = 3.0
"""Of host memory for each GPU: Python, torch and CUDA in the trainer, vLLM's processes, Ray."""
CPU_PROCESS_GIB = {"pruning": 0.4, "training": 0.5, "vLLM": 0.5}
"""Of a process on CPUs once it has imported what it runs, before it holds a model; mapped libraries apart."""
CPU_OTHERS_GIB, CPU_RL_OTHERS_GIB = 1.6, 5.0
"""Of the driver, the stage's own process and Ray's on CPUs: measured in a recovery by CPT, and in one by GRPO."""
EVALUATION_SHARE = 0.9
TEACHER_SHARE = 0.8
BUCKET_GIB = 2.0
"""verl's buffer for weights on their way to vLLM."""
MAX_FILE_BYTES = 5 << 30
"""Of a checkpoint's file, as in ``ptl_rl/checkpoints/write.py``, which imports torch."""
ROLLOUT_SEQUENCES = 256
"""``max_num_seqs`` of verl's engines."""


@dataclass(frozen=True)
class Phase:
    """What one phase of a cycle holds."""

    name: str
    cycle: int
    parts: Parts
    """On one GPU; on CPUs in all processes of one worker."""
    host: float = 0.0
    """Bytes of one node's host memory."""
    room: float | None = None
    """Sequences of full length that a vLLM engine's cache holds at once, where there is an engine."""

    @property
    def bytes(self) -> float:
        return total(self.parts)

    @property
    def others_gib(self) -> float:
        """On CPUs, of the processes that are no workers'."""
        return CPU_RL_OTHERS_GIB if self.name in ("recover: grpo", "recover: distill") else CPU_OTHERS_GIB


@dataclass(frozen=True)
class Planned:
    """What the arithmetic of memory and time is about."""

    config: RunConfig
    device: Device
    attention: str

    @property
    def value_bytes(self) -> int:
        """Of the computing type; CPUs compute in float32 throughout."""
        return 4 if self.device.is_cpu or self.config.model.dtype == "float32" else 2

    @property
    def training_bytes(self) -> int:
        """Of what verl trains in: on GPUs bfloat16, whatever the rollouts' type."""
        return 4 if self.device.is_cpu else 2

    def trainers(self, recovery: AnyRecovery) -> int:
        """Workers that train in this recovery."""
        resources = self.config.resources
        if self.device.is_cpu:
            return resources.workers
        taken = recovery.teacher_workers_per_node if isinstance(recovery, DistillConfig) else 0
        if (left := resources.workers_per_node - taken) < 1:
            raise ConfigError(
                f"recovery.teacher_workers_per_node {taken} leaves none of {resources.workers_per_node} GPUs a node to "
                "train; raise resources.workers_per_node"
            )
        return resources.nodes * left

    @property
    def length(self) -> int:
        """Longest prompt and response."""
        return self.config.data.max_prompt_tokens + self.config.data.max_response_tokens

    def rows(self, recovery: AnyRecovery) -> Rows:
        """The largest micro-batch: as many tokens as it may have, or padded rows of the longest sequences."""
        workers = self.trainers(recovery)
        unpadded = self.attention == "flash_attention_2"
        if isinstance(recovery, CptConfig):
            longest, of_worker = recovery.max_tokens, max(1, recovery.sequences_per_step // workers)
            if recovery.tokens_per_step is not None:
                of_worker = max(1, recovery.tokens_per_step // longest // workers)
            most = max(1, recovery.micro_batch_tokens // longest)
        else:
            longest, most = self.length, recovery.micro_batch_sequences
            prompts = recovery.mini_batch_prompts or recovery.prompts_per_step
            of_worker = max(1, prompts * recovery.rollouts_per_prompt // workers)
            unpadded = unpadded if recovery.dynamic_batches is None else recovery.dynamic_batches
        at_once = min(of_worker, most) if unpadded else micro_batch(of_worker, most)
        return Rows(at_once * longest, longest)

    def trainer(self, shape: ModelShape, recovery: AnyRecovery) -> Trainer:
        reshard = recovery.reshard_after_forward if isinstance(recovery, CptConfig) else True
        return Trainer(
            shape,
            self.trainers(recovery),
            self.training_bytes,
            self.attention,
            recovery.gradient_checkpointing,
            reshard,
            self.device.is_cpu,
        )

    def engine(
        self, shape: ModelShape, sequences: int, length: int | None = None, parallel: int | None = None
    ) -> Engine:
        parallel = parallel or self.config.resources.tensor_parallel_size
        return Engine(shape, self.value_bytes, parallel, length or self.length, sequences)

    @property
    def evaluated_length(self) -> int:
        config = self.config
        return config.data.max_prompt_tokens + (
            config.evaluation.max_response_tokens or config.data.max_response_tokens
        )


def phases(planned: Planned, shape: ModelShape, cuts: list[Cut]) -> list[Phase]:
    """Of every kind of phase the largest, in the order in which a cycle has them."""
    found: dict[str, Phase] = {}
    for phase in _all(planned, shape, cuts):
        if phase.name not in found or phase.bytes > found[phase.name].bytes:
            found[phase.name] = phase
    return list(found.values())


def _all(planned: Planned, shape: ModelShape, cuts: list[Cut]) -> Iterator[Phase]:
    yield _evaluation(planned, shape, 0)
    original = shape
    for number, cut in enumerate(cuts, 1):
        if not cut.is_empty and planned.config.schedule.mode == "in_place":
            yield from _cut_in_place(planned, shape, original, cut, number)
        elif not cut.is_empty:
            yield from _pruning(planned, shape, cut, number)
        before, shape = shape, shape.sliced(cut.channels, cut.layers)
        trained = before if planned.config.schedule.mode == "in_place" else shape
        planned_first = [(trained, recovery) for recovery in planned.config.recoveries(cut.planned)]
        sliced = [(shape, recovery) for recovery in planned.config.recovery_if_unlearnable]
        for of_shape, recovery in planned_first + sliced:
            if isinstance(recovery, CptConfig):
                yield _cpt(planned, of_shape, original, recovery, number)
            else:
                yield from _rl(planned, of_shape, original, recovery, number)
        yield _evaluation(planned, shape, number)


def _with_runtime(planned: Planned, parts: Parts, process: str = "training", asleep: bool = False) -> Parts:
    if planned.device.is_cpu:
        return {**parts, "process": CPU_PROCESS_GIB[process] * GIB}
    return {**parts, "runtime": (GPU_RUNTIME_GIB + (ASLEEP_GIB if asleep else 0)) * GIB}


def _evaluation(planned: Planned, shape: ModelShape, number: int) -> Phase:
    engine = planned.engine(shape, planned.config.evaluation.batch_size, planned.evaluated_length)
    host = planned.config.resources.workers_per_node * HOST_PROCESS_GIB * GIB
    if planned.device.is_cpu:
        parts, room = engine.on_cpu()
        return Phase("evaluate", number, {**parts, "vLLM process": CPU_PROCESS_GIB["vLLM"] * GIB}, room=room)
    parts, room = engine.on_gpu(EVALUATION_SHARE * planned.device.memory_gib * GIB)
    return Phase("evaluate", number, parts, host, room)


def _pruning(planned: Planned, shape: ModelShape, cut: Cut, number: int) -> Iterator[Phase]:
    config, workers = planned.config, planned.config.resources.workers
    pruner = Pruner(config, workers, planned.value_bytes, planned.attention, planned.device.is_cpu)
    host = config.resources.workers_per_node * HOST_PROCESS_GIB * GIB
    one_file = config.resources.workers_per_node * min(4.0 * shape.parameters / workers, MAX_FILE_BYTES)
    yield Phase("score", number, _with_runtime(planned, pruner.score(shape, cut), "pruning"), host)
    if config.criterion.compensate != "none":
        yield Phase("slice: compensate", number, _with_runtime(planned, pruner.compensate(shape, cut), "pruning"), host)
    check = pruner.check(shape)
    if planned.device.is_cpu:
        check = max(check, {"files": one_file}, key=total)
    yield Phase("slice: check", number, _with_runtime(planned, check, "pruning"), host + one_file)


def _cut_in_place(planned: Planned, shape: ModelShape, original: ModelShape, cut: Cut, number: int) -> Iterator[Phase]:
    """As the stages, beside what is trained: its shards in float32, gradients and moments, and the cut's own copies.

    These are a rank's rows of the new weights and, where damage decides, of the old ones and of a second trial.
    """
    (recovery,) = planned.config.recovery
    state = planned.trainer(shape, recovery).state() if not recovery.offload else {}
    trials = 3 if planned.config.schedule.pace == "governed" else 1
    copies = trials * 4.0 * (shape.parameters - shape.embedding_parameters) / planned.trainers(recovery)
    trained = {"optimizer": sum(state.values())}
    if isinstance(recovery, CptConfig) and recovery.parent_kl:  # it was loaded for the first step, and stays
        root = original.embedding_parameters * (1 if original.tied else 2)
        trained["parent"] = planned.value_bytes * (original.parameters / planned.trainers(recovery) + root)
    for phase in _pruning(planned, shape, cut, number):
        if phase.name != "slice: check":
            parts = {**phase.parts, **trained, "optimizer": trained["optimizer"] + copies}
            phase = replace(phase, parts=parts)
        yield phase
    if planned.config.schedule.rematerialise != "never":
        # Sliced weights and moments beside those that they are sliced from, and one projection whole.
        sliced = 12.0 * (shape.parameters - shape.embedding_parameters) / planned.trainers(recovery)
        parts = {**trained, "sliced": 0.0 if recovery.offload else sliced}
        parts["projection"] = 2 * 4.0 * shape.hidden_size * shape.intermediate_size
        per_node = planned.trainers(recovery) // planned.config.resources.nodes
        host = _host(planned, shape, recovery, None) + (per_node * sliced if recovery.offload else 0.0)
        yield Phase("slice in place", number, _with_runtime(planned, parts), host)


def _host(planned: Planned, shape: ModelShape, recovery: AnyRecovery, reference: ModelShape | None) -> float:
    """While verl loads, rank 0 holds all in float32, every rank where embeddings are tied; then what is offloaded."""
    per_node = planned.trainers(recovery) // planned.config.resources.nodes
    shared = 4.0 * shape.parameters / planned.config.resources.nodes
    held = 4.0 * reference.parameters / planned.config.resources.nodes if reference else 0.0
    loading = 4.0 * shape.parameters * (per_node if shape.tied else 1)
    writing = per_node * min(4.0 * shape.parameters / planned.trainers(recovery), MAX_FILE_BYTES)
    idle = (3 * shared if recovery.offload else 0.0) + writing
    return held + max(loading, idle) + planned.config.resources.workers_per_node * HOST_PROCESS_GIB * GIB


def _cpt(planned: Planned, shape: ModelShape, original: ModelShape, recovery: CptConfig, number: int) -> Phase:
    trainer, rows = planned.trainer(shape, recovery), planned.rows(recovery)
    parts = trainer.update(rows, in_place=not recovery.parent_kl)
    if recovery.parent_kl:
        parts = {**parts, "parent": _parent(planned, original, trainer, rows)}
    if planned.device.is_cpu:
        parts = _loading(trainer, parts)
    return Phase("recover: cpt", number, _with_runtime(planned, parts), _host(planned, shape, recovery, None))


def _loading(trainer: Trainer, parts: Parts) -> Parts:
    """On CPUs a worker that loads has the model twice, and that may be more than training needs."""
    return max(parts, {"parameters": 4.0 * trainer.shape.parameters, "loading": 4 * trainer.share}, key=total)


def _parent(planned: Planned, original: ModelShape, trainer: Trainer, rows: Rows) -> float:
    """Its share, what is whole of it, its logits (padded and without padding) and a chunk's distributions."""
    of_each = planned.value_bytes
    root = original.embedding_parameters * (1 if original.tied else 2)
    share = of_each * (original.parameters / trainer.workers + root + 2 * original.block_parameters)
    chunk = 4 * 4.0 * min(rows.tokens, CHUNK_TOKENS) * original.vocab_size
    return share + 2 * of_each * rows.tokens * original.vocab_size + chunk


def _rl(
    planned: Planned, shape: ModelShape, original: ModelShape, recovery: GrpoConfig, number: int
) -> Iterator[Phase]:
    trainer, rows = planned.trainer(shape, recovery), planned.rows(recovery)
    method, reference = recovery.method, None
    if recovery.kl_loss:
        reference = original if recovery.kl_to == "parent" else shape
    host = _host(planned, shape, recovery, reference)
    engine = planned.engine(shape, ROLLOUT_SEQUENCES)
    if planned.device.is_cpu:
        served, room = engine.on_cpu()
        parts = {**_with_runtime(planned, _loading(trainer, trainer.update(rows))), **served}
        parts["vLLM process"] = CPU_PROCESS_GIB["vLLM"] * GIB
        if reference:
            parts["reference"] = 4 * planned.trainer(reference, recovery).share
        yield Phase(f"recover: {method}", number, parts, room=room)
        return
    allowed = planned.config.resources.gpu_memory_utilization * planned.device.memory_gib * GIB
    idle = {} if recovery.offload else trainer.state()
    served, room = engine.on_gpu(allowed)
    yield Phase(f"{method}: rollouts", number, {**_with_runtime(planned, idle), **served}, host, room)
    largest = 2 * 4.0 * shape.embedding_parameters
    sync = {**idle, "vLLM weights": engine.weights, "transfer": BUCKET_GIB * GIB + largest}
    yield Phase(f"{method}: weight sync", number, _with_runtime(planned, sync, asleep=True), host)
    optimizer = not recovery.offload
    old = trainer.read(rows, optimizer=optimizer, entropy=True)
    yield Phase(f"{method}: log-probs", number, _with_runtime(planned, old, asleep=True), host)
    if reference:
        reader = planned.trainer(reference, recovery)
        read = reader.read(rows, optimizer=False, parameters=False)
        read |= trainer.state() if optimizer else {}
        read = {("reference" if name == "gathered" else name): size for name, size in read.items()}
        yield Phase(f"{method}: reference", number, _with_runtime(planned, read, asleep=True), host)
    update = trainer.update(rows)
    yield Phase(f"{method}: update", number, _with_runtime(planned, update, asleep=True), host)
    if isinstance(recovery, DistillConfig):
        teacher = planned.engine(original, ROLLOUT_SEQUENCES, planned.length + 1, recovery.teacher_tensor_parallel_size)
        served, room = teacher.on_gpu(TEACHER_SHARE * planned.device.memory_gib * GIB)
        yield Phase(f"{method}: teacher", number, served, host, room)
