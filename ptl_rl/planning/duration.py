"""Hours of every stage of a run, from FLOPs, bytes and :mod:`ptl_rl.planning.assumptions`."""

from dataclasses import dataclass

from ptl_rl.config import AnyRecovery, CptConfig, DistillConfig, GrpoConfig, RunConfig
from ptl_rl.config.in_place import HELD_OUT, TRIAL_SEQUENCES
from ptl_rl.config.pruning import REFERENCE_PROMPTS
from ptl_rl.families import ModelShape
from ptl_rl.planning.assumptions import Assumptions
from ptl_rl.planning.disk import RESUMABLE_BYTES, WEIGHT_BYTES, saves
from ptl_rl.planning.memory import EVALUATION_SHARE, ROLLOUT_SEQUENCES, Planned
from ptl_rl.planning.pruning_memory import Pruner
from ptl_rl.planning.rows import evaluation_rows
from ptl_rl.planning.schedule import Cut, recovery_steps
from ptl_rl.planning.serving_memory import Engine

BYPASS = "algorithm.rollout_correction.bypass_mode"
"""verl key with which rollouts' own log-probabilities are taken, so that none are computed again."""
MEASURED_CHANNELS = 18944
"""Of the criterion ``ptl_reference``, as in ``pruning/score/criteria.py``."""
GOVERNED_TRIALS = 5
"""Widths that are tried out for a cut as large as its damage allows."""
FINALISTS = 4
"""Of ``leave_one_out``, as in ``pruning/choose/absorption.py``."""
GIGABYTE = 1e9


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage."""

    stage: str
    cycle: int
    seconds: float


@dataclass(frozen=True)
class Clock:
    """Seconds of what a run does."""

    planned: Planned
    assumed: Assumptions

    @property
    def config(self) -> RunConfig:
        return self.planned.config

    def _rate(self, share: float) -> float:
        """FLOPs a second of one worker."""
        return self.planned.device.teraflops * 1e12 * share

    def disk(self, size: float) -> float:
        """Of ``size`` bytes, all workers together."""
        return size / (self.assumed.disk_gb_per_second * GIGABYTE)

    @property
    def mean_prompt(self) -> float:
        return min(self.assumed.mean_prompt_tokens, self.config.data.max_prompt_tokens)

    def generate(self, engine: Engine, room: float, engines: int, prompts: int, longest: int) -> float:
        """Of answering ``prompts`` on all engines, the last and longest answers included.

        A step of decoding reads the weights once and every sequence's cache, or computes; the longest answers are
        finished by the last few sequences.
        """
        device, mean = self.planned.device, self.assumed.mean_response_share * longest
        share = -(-prompts // engines)
        at_once = max(1.0, min(share, engine.sequences, room))
        context = self.mean_prompt + mean / 2

        def step(sequences: float) -> float:
            read = engine.weights + sequences * engine.cache_per_token * context
            reading = read / (device.terabytes_per_second * 1e12 * self.assumed.bandwidth_share)
            flops = sequences * engine.shape.flops_per_token(int(context)) / engine.tensor_parallel
            return max(reading, flops / self._rate(self.assumed.reading_share)) + self.assumed.decoding_step_seconds

        prefill = share * self.mean_prompt * engine.shape.flops_per_token(int(self.mean_prompt), output_head=False)
        prefill /= engine.tensor_parallel * self._rate(self.assumed.reading_share)
        return prefill + share / at_once * mean * step(at_once) + (longest - mean) * step(max(1.0, at_once / 8))

    def evaluate(self, shape: ModelShape, models: int = 1) -> float:
        """Of so many models of one shape, one after the other."""
        config, planned = self.config, self.planned
        longest = config.evaluation.max_response_tokens or config.data.max_response_tokens
        engine = planned.engine(shape, config.evaluation.batch_size, planned.evaluated_length)
        room = self._room(engine, EVALUATION_SHARE)
        engines = max(1, config.resources.workers // config.resources.tensor_parallel_size)
        seconds = self.generate(engine, room, engines, evaluation_rows(config, "test"), longest)
        loading = self.disk(planned.value_bytes * shape.parameters)
        return self.assumed.start_seconds + models * (self.assumed.engine_start_seconds + loading + seconds)

    def _room(self, engine: Engine, share: float) -> float:
        device = self.planned.device
        return engine.on_cpu()[1] if device.is_cpu else engine.on_gpu(share * device.memory_gib * 2**30)[1]

    def _pass(self, shape: ModelShape, sequences: int) -> float:
        """Seconds of one pass over so many calibration sequences, without output head."""
        calibration = self.config.calibration
        tokens = self.assumed.mean_document_share * calibration.max_tokens * sequences / self.config.resources.workers
        context = int(self.assumed.mean_document_share * calibration.max_tokens / 2)
        return tokens * shape.flops_per_token(context, output_head=False) / self._rate(self.assumed.reading_share)

    def score(self, shape: ModelShape, cut: Cut) -> float:
        criterion, calibration = self.config.criterion, self.config.calibration
        is_obs = criterion.is_obs and bool(cut.channels)
        overhead = self.assumed.moments_overhead if is_obs else self.assumed.scoring_overhead
        if calibration.token_weights == "sensitivity" or criterion.channels == "taylor":
            overhead += 2
        every = REFERENCE_PROMPTS if criterion.is_ptl_reference else calibration.sequences
        passes = score_passes(self.config, shape, cut, self.config.resources.workers)
        seconds = passes.channels * overhead * self._pass(shape, every)
        seconds += passes.judged * self._pass(shape, min(criterion.layer_sequences or calibration.sequences, every))
        seconds += passes.on_all * self._pass(shape, calibration.sequences)
        if criterion.contrast is not None:
            seconds += overhead * self._pass(shape, criterion.contrast.sequences)
        if is_obs:
            blocks = -(-shape.num_hidden_layers // self.config.resources.workers)
            share = cut.channels / shape.intermediate_size / 0.25
            seconds += blocks * share * self._solve(self.assumed.order_seconds, shape)
        return self.assumed.start_seconds + self.disk(self.planned.value_bytes * shape.parameters) + seconds

    def _solve(self, measured: float, shape: ModelShape) -> float:
        """Seconds of a block's solve, by the cube of its width."""
        device = self.planned.device
        if device.is_cpu:
            return 8 * float(shape.intermediate_size) ** 3 / self._rate(0.3)
        return measured * (shape.intermediate_size / MEASURED_CHANNELS) ** 3 / device.solves

    def slice(self, shape: ModelShape, cut: Cut) -> float:
        """Compensation, files, and the export check, which reads what was cut and what was written."""
        config = self.config
        after = shape.sliced(cut.channels, cut.layers)
        seconds = self.disk(self.planned.value_bytes * (2 * shape.parameters + 2 * after.parameters))
        if config.criterion.compensate != "none":
            sums = self.assumed.moments_overhead - 1
            seconds += (4 + sums) * self._pass(shape, config.calibration.sequences)
            at_once = min(2, config.resources.workers)  # a block's two regressions, side by side
            seconds += after.num_hidden_layers * self._solve(self.assumed.solve_seconds, shape) / at_once
        return self.assumed.start_seconds + seconds

    def _train_flops(self, shape: ModelShape, recovery: AnyRecovery, context: float) -> float:
        """Of one token's forward and backward pass, the one that checkpointing repeats included."""
        forward = shape.flops_per_token(int(context))
        again = shape.flops_per_token(int(context), output_head=False) if recovery.gradient_checkpointing else 0
        return 3 * forward + again

    def _padding(self, share: float) -> float:
        """How many tokens are computed for one that counts."""
        return 1.0 if self.planned.attention == "flash_attention_2" else 1 / share

    def cpt_step(self, shape: ModelShape, original: ModelShape, recovery: CptConfig) -> float:
        mean = self.assumed.mean_document_share * recovery.max_tokens
        tokens = (recovery.tokens_per_step or recovery.sequences_per_step * mean) * self._padding(0.7)
        tokens /= self.planned.trainers(recovery)
        flops = self._train_flops(shape, recovery, mean / 2)
        seconds = tokens * flops / self._rate(self.assumed.mfu)
        if recovery.parent_kl:
            seconds += tokens * original.flops_per_token(int(mean / 2)) / self._rate(self.assumed.reading_share)
        return seconds

    def cpt(self, shape: ModelShape, original: ModelShape, recovery: CptConfig, steps: int) -> float:
        return self._recovery(shape, recovery, steps, steps * self.cpt_step(shape, original, recovery))

    def rollouts(self, shape: ModelShape, recovery: GrpoConfig, prompts: int) -> float:
        """Of answering ``prompts`` on the engines of those that train."""
        resources, engine = self.config.resources, self.planned.engine(shape, ROLLOUT_SEQUENCES)
        room = self._room(engine, resources.gpu_memory_utilization)
        engines = max(1, self.planned.trainers(recovery) // resources.tensor_parallel_size)
        return self.generate(engine, room, engines, prompts, self.config.data.max_response_tokens)

    def rl_step(self, shape: ModelShape, original: ModelShape, recovery: GrpoConfig) -> dict[str, float]:
        """Seconds of the parts of one step."""
        config, planned, trainers = self.config, self.planned, self.planned.trainers(recovery)
        answers = recovery.prompts_per_step * recovery.rollouts_per_prompt
        mean = self.mean_prompt + self.assumed.mean_response_share * config.data.max_response_tokens
        tokens = answers * mean * self._padding(mean / planned.length) / trainers
        reading, by_parent = (
            tokens * of.flops_per_token(int(mean / 2)) / self._rate(self.assumed.reading_share)
            for of in (shape, original)
        )
        reference = by_parent if recovery.kl_to == "parent" else reading
        bypassed = {**config.verl, **recovery.verl}.get(BYPASS) is True
        found = {
            "rollouts": self.rollouts(shape, recovery, answers),
            "log-probabilities": 0.0 if bypassed else reading,
            "reference": reference if recovery.kl_loss else 0.0,
            "update": tokens * self._train_flops(shape, recovery, mean / 2) / self._rate(self.assumed.mfu),
            "beside": self.assumed.step_seconds,
        }
        if isinstance(recovery, DistillConfig):
            teachers = recovery.teacher_workers_per_node * config.resources.nodes
            flops = answers * mean * original.flops_per_token(int(mean / 2))
            found["teacher"] = flops / teachers / self._rate(self.assumed.reading_share)
        return found

    def rl(self, shape: ModelShape, original: ModelShape, recovery: GrpoConfig, steps: int) -> float:
        seconds = steps * sum(self.rl_step(shape, original, recovery).values())
        seconds += self.assumed.engine_start_seconds
        if recovery.validate_before:
            seconds += self.rollouts(shape, recovery, evaluation_rows(self.config, "validation"))
        return self._recovery(shape, recovery, steps, seconds)

    def _recovery(self, shape: ModelShape, recovery: AnyRecovery, steps: int, training: float) -> float:
        loading = self.disk(WEIGHT_BYTES * shape.parameters)
        written = saves(recovery, steps) * RESUMABLE_BYTES * shape.parameters + WEIGHT_BYTES * shape.parameters
        return self.assumed.start_seconds + loading + training + self.disk(written)

    @property
    def _compensations(self) -> float:
        """Of one cut in place, in compensations that read all sequences: trials read a part of them."""
        if self.config.schedule.pace != "governed":
            return 1.0
        share = TRIAL_SEQUENCES / (self.config.calibration.sequences * (1 - 1 / HELD_OUT))
        return GOVERNED_TRIALS if share >= 1 else 1 + GOVERNED_TRIALS * share

    def cuts_in_place(self, shape: ModelShape, number: int) -> list[StageTime]:
        """Scoring and compensation of every cut, the checkpoint after it, and the sliced model that is written last."""
        times, left = [], shape
        for channels, layers in self.config.schedule.cuts_in_order:
            cut = Cut(channels, layers, 0)
            start = self.assumed.start_seconds
            seconds = self.score(left, cut) - start + self._compensations * (self.slice(left, cut) - start)
            bytes_each = RESUMABLE_BYTES + (WEIGHT_BYTES if self.config.evaluation.after_cut else 0)
            times.append(StageTime("cut", number, seconds + self.disk(bytes_each * shape.parameters)))
            left = left.sliced(channels, layers)
        models = 1 + self.config.evaluation.after_cut
        written = models * self.disk(WEIGHT_BYTES * (shape.parameters + left.parameters))
        (recovery,), schedule = self.config.recovery, self.config.schedule
        if schedule.pace == "governed" and isinstance(recovery, GrpoConfig):
            often = recovery.steps_of(0) // schedule.validate_every
            seconds = often * self.rollouts(shape, recovery, evaluation_rows(self.config, "validation"))
            times.append(StageTime("validate", number, seconds))
        return [*times, StageTime("slice", number, self.assumed.start_seconds + written)]

    def saved_by_slicing(self, shape: ModelShape, recovery: AnyRecovery) -> float:
        """Seconds that a training in place is shorter by, where it goes on with sliced models; starts are paid from it.

        Where its pace finds the cuts there is nothing to go by, and it is 0.
        """
        schedule = self.config.schedule
        if schedule.rematerialise == "never" or schedule.pace == "governed":
            return 0.0

        def step(of: ModelShape) -> float:
            if isinstance(recovery, CptConfig):
                return self.cpt_step(of, shape, recovery)
            # What a KL term holds the policy to keeps its shape.
            reference = self.rl_step(shape, shape, recovery)["reference"]
            return sum((self.rl_step(of, shape, recovery) | {"reference": reference}).values())

        saved, trained, left = 0.0, shape, shape
        cuts = schedule.cuts_in_order
        for index, (channels, layers) in enumerate(cuts):
            left = left.sliced(channels, layers)
            # A start is told from the first step, so that one is made before anything is sliced.
            steps = sum(map(recovery.steps_of, range(index, len(cuts)))) - (index == 0)
            start = self.assumed.start_seconds + self.disk((RESUMABLE_BYTES + WEIGHT_BYTES) * left.parameters)
            start += 0.0 if isinstance(recovery, CptConfig) else self.assumed.engine_start_seconds
            gain = steps * (step(trained) - step(left)) - start
            if steps and (schedule.rematerialise == "after_every_cut" or gain > 0):
                saved, trained = saved + gain, left
        return saved

    def run(self, shape: ModelShape, cuts: list[Cut]) -> list[StageTime]:
        """Every stage of the run as planned; the gate may ask for more."""
        original = shape
        times = [StageTime("evaluate", 0, self.evaluate(shape))]
        for number, cut in enumerate(cuts, 1):
            in_place = self.config.schedule.mode == "in_place"
            if in_place:
                times += self.cuts_in_place(shape, number)
            elif not cut.is_empty:
                times.append(StageTime("score", number, self.score(shape, cut)))
                times.append(StageTime("slice", number, self.slice(shape, cut)))
            before, shape = shape, shape.sliced(cut.channels, cut.layers)
            trained = before if in_place else shape
            for part, recovery in enumerate(self.config.recoveries(cut.planned)):
                steps = recovery_steps(self.config, cut.planned, part)
                if isinstance(recovery, CptConfig):
                    seconds = self.cpt(trained, original, recovery, steps)
                else:
                    seconds = self.rl(trained, original, recovery, steps)
                seconds -= self.saved_by_slicing(before, recovery) if in_place else 0.0
                times.append(StageTime(f"recover: {recovery.method}", number, seconds))
            both = self.config.evaluation.after_cut and not cut.is_empty
            times.append(StageTime("evaluate", number, self.evaluate(shape, models=1 + both)))
        return times


@dataclass(frozen=True)
class Passes:
    """How often scoring goes over its sequences."""

    channels: int
    judged: int
    """Over those that blocks are judged on."""
    on_all: int
    """Over all, for blocks."""


def score_passes(config: RunConfig, shape: ModelShape, cut: Cut, workers: int) -> Passes:
    """As ``engine.batches_to_read`` counts them, without torch."""
    criterion, calibration = config.criterion, config.calibration
    groups = 1
    if criterion.is_obs and cut.channels and calibration.moments_gib is not None:
        each = 4 * shape.intermediate_size**2 / 2**30
        groups = -(-shape.num_hidden_layers // max(1, int(calibration.moments_gib / each) * workers))
    part = criterion.layer_sequences is not None and criterion.layer_sequences < calibration.sequences
    if criterion.layers == "leave_one_out":
        left = [shape.num_hidden_layers - gone for gone in range(cut.layers)]
        on_all = sum(_regression_groups(config, shape, count - 1, workers) for count in left)
        on_all = on_all if criterion.compensate != "none" else 0
        return Passes(groups, sum(left), on_all + (sum(min(FINALISTS, count) for count in left) if part else 0))
    if criterion.layers == "explicit":
        return Passes(groups, 0, 0)
    read_alike = not part and not criterion.is_ptl_reference
    return Passes(groups, max(0, cut.layers - read_alike), 0)


def _regression_groups(config: RunConfig, shape: ModelShape, count: int, workers: int) -> int:
    return -(-count // (Pruner.regressions(shape, config.calibration.moments_gib) * workers))
