"""Everything that can be found wrong before Ray starts, found before Ray starts."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ptl_rl.attention import Attention, resolve_attention
from ptl_rl.config import ConfigError, CptConfig, GrpoConfig, RunConfig
from ptl_rl.data.corpora import load_corpus
from ptl_rl.data.prepare import RunData, run_data
from ptl_rl.data.records import DataError, Progress, no_progress
from ptl_rl.driver.cluster import check_layout
from ptl_rl.driver.environment import check_gpus, detect_device, oldest_capability, own_ray_folder
from ptl_rl.driver.model_checks import ModelChecks
from ptl_rl.driver.prompt_checks import check_prompts
from ptl_rl.driver.state import data_subsets
from ptl_rl.errors import PathError, check_plain, check_run_dir, check_sockets
from ptl_rl.evaluation.speed import Spread
from ptl_rl.families import ModelShape, UnsupportedModelError, read_config_json
from ptl_rl.models import open_model
from ptl_rl.planning.disk import disk_use
from ptl_rl.planning.lengths import length_notes, too_long
from ptl_rl.planning.model import weight_bytes
from ptl_rl.planning.schedule import check_cuts, settled, speed_wanted

LOOKED_AT = 200
"""Rows of a set, the first in its seeded order, that are looked at for boxes."""
FEWEST_BOXED = 0.1
"""Of these, a smaller share with a box is as good as none."""


@dataclass
class SpeedsFound:
    """What ``schedule.target.tokens_per_second`` came to."""

    target: float
    original: int
    """Channels of the original."""
    channels_total: int = 0
    widths: dict[int, Spread] = field(default_factory=dict)
    """Speeds beside the original's of what was measured, by channels that were left."""

    @property
    def notes(self) -> list[str]:
        """In words."""
        return [
            f"schedule.target.tokens_per_second: {width} of {self.original} channels are {found.median:.2f} times as "
            f"fast ({found.low:.2f}-{found.high:.2f})"
            for width, found in self.widths.items()
        ]

    def save(self, path: Path) -> None:
        """Raises :class:`ConfigError` where it cannot be written."""
        try:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written ({error.strerror or error}); choose another `run_dir`"
            ) from None


def settle(config: RunConfig, progress: Progress = no_progress) -> tuple[RunConfig, SpeedsFound | None]:
    """A recipe whose schedule names its cuts, and what was measured for that.

    It finds the model only where the cuts depend on it, and measures only for ``schedule.target.tokens_per_second``.

    Raises:
        ConfigError: no cut reaches the target, or speeds cannot be measured here.
    """
    if not config.schedule.is_open:
        return config, None
    model, shape = check_model(config)
    if (speed := speed_wanted(config.schedule)) is None:
        return settled(config, shape), None
    found = _channels_for_speed(config, model, shape, speed, progress)
    schedule = config.schedule.model_dump() | {"target": None, "channels_total": found.channels_total}
    config = config.model_copy(update={"schedule": type(config.schedule)(**schedule)})
    check_cuts(config, shape)
    return settled(config, shape), found


def _channels_for_speed(
    config: RunConfig, model: Path, shape: ModelShape, target: float, progress: Progress
) -> SpeedsFound:
    from ptl_rl.cpu.checks import is_cpu_only
    from ptl_rl.evaluation.speed_target import NotMeasured, OutOfReach, Wanted, channels_for_speed

    setting = "schedule.target.tokens_per_second"
    device, here = detect_device(config), "cpu" if is_cpu_only() else "cuda"
    if device != here:
        raise ConfigError(
            f"{setting}: speeds are measured where ptl run is started, on {here}, but the run is for {device}; start "
            f"it where there is {device}, or measure there with ptl speed and set schedule.channels_total"
        )
    parallel, found = config.resources.tensor_parallel_size, SpeedsFound(target, shape.intermediate_size)
    wanted = Wanted(
        model=str(model),
        target=target,
        first=shape.intermediate_size - settled(config, shape).schedule.channels_sum,
        layers=config.schedule.layers_total,
        alignment=config.schedule.alignment * parallel,
        dtype=config.model.dtype,
        tensor_parallel_size=parallel,
    )
    try:
        found.channels_total = channels_for_speed(wanted, progress, found.widths.__setitem__)
    except OutOfReach as error:
        raise ConfigError(f"{setting} is {target:g}: {error}") from None
    except NotMeasured as error:
        raise ConfigError(
            f"{setting}: {error}; free the machine or its GPU, see that vLLM is installed (ptl doctor), or set "
            "schedule.channels_total"
        ) from None
    return found


def check_model(config: RunConfig) -> tuple[Path, ModelShape]:
    """Find the model and check the schedule against its shape."""
    model, shape = _open(config.model.path, "model.path", prunable=not config.schedule.recover_only)
    check_parent(config)
    check_cuts(config, shape)
    return model, shape


def _open(name: str, setting: str, *, prunable: bool = False) -> tuple[Path, ModelShape]:
    try:
        model, shape = open_model(name, setting=setting, prunable=prunable)
        check_plain(model)
    except (UnsupportedModelError, PathError) as error:
        raise ConfigError(f"{setting}: {error}") from None
    return model, shape


def check_parent(config: RunConfig) -> Path | None:
    """The folder of ``model.parent``; None if it is not set."""
    if config.model.parent is None:
        return None
    return _open(config.model.parent, "model.parent")[0]


def check_attention(config: RunConfig, device: str, model: Path) -> Attention:
    """What ``model.attention`` comes to on ``device``; raises :class:`ConfigError` if it cannot be had."""
    capability = oldest_capability() if device == "cuda" else None
    return resolve_attention(config.model.attention, device, config.model.dtype, read_config_json(model), capability)


def too_few(config: RunConfig, data: RunData) -> str | None:
    """Why the subsets of the data do not do for a step of a recovery, if they do not."""
    corpus = "corpus" if "corpus" in data.subsets else "train"
    rl = [("train", r.prompts_per_step, "prompts_per_step") for r in config.all_recoveries if isinstance(r, GrpoConfig)]
    cpt = [
        (corpus, r.sequences_per_step, "sequences_per_step")
        for r in config.all_recoveries
        if isinstance(r, CptConfig) and r.tokens_per_step is None
    ]
    for name, wanted, setting in sorted(rl + cpt, key=lambda needed: -needed[1]):
        parts = data.subsets.get(name, [])
        smallest = min(parts, key=len, default=())
        if not parts or len(smallest) >= wanted:
            continue
        if setting == "sequences_per_step" and any(not record.question for record in smallest):
            continue  # a text may become several sequences
        return (
            f"data.{name}: {len(data.sets[name])} rows in {len(parts)} subsets leave {len(smallest)} in a subset, "
            f"but recovery.{setting} is {wanted}; give more rows, a smaller {setting} or fewer cycles"
        )
    return None


def calibration_notes(config: RunConfig, data: RunData) -> list[str]:
    """That cycles are scored on fewer sequences than asked for, where that is so."""
    name = "corpus" if "corpus" in data.subsets else "train"
    smallest = min(map(len, data.subsets[name]))
    if config.schedule.recover_only or config.calibration.source == "rollouts":
        return []
    wanted = config.calibration.sequences
    if smallest >= wanted:
        return []
    return [f"calibration.sequences is {wanted}, but a cycle's subset of data.{name} has {smallest} rows: all are read"]


def suffix_notes(config: RunConfig) -> list[str]:
    """What questions are given that the recipe does not say."""
    if config.data.prompt_suffix is not None or not config.prompt_suffix:
        return []
    return [
        f"data.prompt_suffix is not set: every question is followed by {config.prompt_suffix.strip()!r}, as the "
        "answer is looked for in its box"
    ]


def box_notes(config: RunConfig, data: RunData) -> list[str]:
    """That CPT learns from worked solutions without the box by which answers are judged, where that is so."""
    learns = any(isinstance(recovery, CptConfig) and recovery.cross_entropy for recovery in config.all_recoveries)
    if not learns or config.evaluation.judge != "boxed":
        return []
    name = "corpus" if "corpus" in data.sets else "train"
    solutions = [record.solution for record in data.sets[name][:LOOKED_AT] if record.question]
    boxed = sum("\\boxed" in solution for solution in solutions)
    if boxed >= FEWEST_BOXED * len(solutions):
        return []
    return [
        f"data.{name}: {boxed} of {len(solutions)} worked solutions that were looked at have a \\boxed{{}}, by which "
        "evaluation.judge tells a right answer, and cpt teaches the model to write as they do: end them in "
        "\\boxed{ANSWER}, or judge by your own function (evaluation.judge: reward, reward.path: FILE)"
    ]


def data_notes(config: RunConfig, data: RunData) -> list[str]:
    """All that is worth knowing of what a run reads."""
    return [*data.notes(), *calibration_notes(config, data), *suffix_notes(config), *box_notes(config, data)]


def check_data(config: RunConfig, progress: Progress = no_progress) -> RunData:
    """Read every row that the run will use."""
    try:
        data = run_data(config, data_subsets(config), progress)
    except DataError as error:
        raise ConfigError(str(error)) from None
    if problem := too_few(config, data):
        raise ConfigError(problem)
    return data


def check_reward(config: RunConfig, data: RunData) -> None:
    """Load a user's reward function and call it once on a sample of the data that it will judge."""
    rl = [recovery for recovery in config.all_recoveries if isinstance(recovery, GrpoConfig)]
    judged = ["test"] if config.evaluation.judge == "reward" else []
    judged += ["train"] if rl else []
    judged += ["validation"] if any(recovery.validate_before for recovery in rl) else []
    if config.reward.file is None or not judged:
        return
    from reward.check import RewardError, check_reward_function

    for name in judged:
        try:
            sample = data.sets[name][0].reward_sample()
            seconds = config.reward.call_seconds
            check_reward_function(config.reward.file, config.reward.name, sample, limit_seconds=seconds)
        except RewardError as error:
            raise ConfigError(f"reward: {error} (on data.{name})") from None


def check_chat_template(config: RunConfig, model: Path) -> None:
    """verl puts questions to the policy in its chat template, and fails minutes later where there is none."""
    if (model / "chat_template.jinja").exists() or not config.needs_answers:
        return
    try:
        settings = json.loads((model / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        settings = {}
    if not settings.get("chat_template"):
        raise ConfigError(
            f"model.path: {model} has no chat template, which grpo and distill need; put a chat_template.jinja beside "
            "its weights, or recover with cpt alone"
        )


def check_lengths(config: RunConfig, model: Path) -> list[str]:
    """Refuse prompts and responses that are together more than the model can read; gives notes on other lengths."""
    values = read_config_json(model)
    if (problem := too_long(config, values, config.model.path)) is not None:
        raise ConfigError(problem)
    return length_notes(config, values)


def check_criterion(config: RunConfig, shape: ModelShape, progress: Progress = no_progress) -> None:
    """Load a user's criterion and the general text, and hold block ids against the model."""
    criterion = config.criterion
    beyond = [layer for layer in criterion.layer_ids if layer >= shape.num_hidden_layers]
    if beyond:
        raise ConfigError(
            f"criterion.layer_ids: {beyond[0]}, but the model's {shape.num_hidden_layers} blocks are "
            f"0..{shape.num_hidden_layers - 1}"
        )
    if criterion.contrast is not None:
        try:
            load_corpus(criterion.contrast.data, config.seed, config.data.max_bad_fraction, progress=progress)
        except DataError as error:
            raise ConfigError(f"criterion.contrast.data: {error}") from None
    if criterion.path is not None:
        from ptl_rl.pruning.score.criteria import CriterionError, load_criterion, needs_of, try_out

        try:
            function = load_criterion(criterion.channels, criterion.path)
            try_out(function)
        except CriterionError as error:
            raise ConfigError(str(error)) from None
        if needs_of(function).gradients and config.calibration.token_weights == "sensitivity":
            raise ConfigError(
                f"criterion.channels: {criterion.channels} reads gradients of its own; set calibration.token_weights "
                "to uniform, not sensitivity"
            )


def check_disk(config: RunConfig, shape: ModelShape, model: Path, run_dir: Path) -> None:
    """Hold what ``ptl plan`` says of the run's folder against the free space."""
    needed = disk_use(config, shape, weight_bytes(model)).peak
    parent = next(p for p in [run_dir, *run_dir.parents] if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"{run_dir}: the run writes up to {needed / 2**30:.1f} GiB of checkpoints, but {free / 2**30:.1f} GiB are "
            "free; choose another `run_dir`, or raise recovery.save_every_steps (ptl plan shows what each takes)"
        )


def check(config: RunConfig, run_dir: Path, progress: Progress = no_progress) -> list[str]:
    """All checks; returns notes for the user, or raises :class:`ConfigError` with one sentence on the first problem."""
    check_plain(run_dir)
    check_run_dir(run_dir)
    check_sockets(own_ray_folder())
    check_gpus(config, config.resources.device)  # before anything is downloaded
    model, shape = check_model(config)
    config = settled(config, shape)
    with ModelChecks(config, model) as checks:
        device = detect_device(config)
        check_layout(config, device)
        lengths = check_lengths(config, model)
        attention = check_attention(config, device, model)
        check_chat_template(config, model)
        check_disk(config, shape, model, run_dir)
        if not config.schedule.recover_only:
            check_criterion(config, shape, checks.watched(progress))
        data = check_data(config, checks.watched(progress))
        prompts = [*checks.notes(), *check_prompts(config, data, checks.prompt_tokens)]
    check_reward(config, data)
    return [
        *([attention.note] if attention.note else []),
        *lengths,
        *prompts,
        *data_notes(config, data),
    ]
