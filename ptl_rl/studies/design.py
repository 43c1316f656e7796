"""Which runs a study consists of: pure functions from a recipe to its variations.

All rows of a study have the same data, the same recovery steps and, in all cycles together, the same number of
calibration sequences; where rows are cut by other means, they are cut to the nearest number of parameters that these
means can give.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from ptl_rl.baselines.slicegpt import FAMILIES as SLICEGPT_FAMILIES
from ptl_rl.config import ConfigError, DistillConfig, RunConfig
from ptl_rl.config.recipe import parse_config
from ptl_rl.config.recovery import AFTER_CUTS
from ptl_rl.families import BASELINES, FAMILIES, ModelShape
from ptl_rl.planning.schedule import geometric, planned_cuts, recovery_steps

Values = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of a study's table, made once for every seed."""

    name: str
    """For files: lower case, digits, hyphens."""
    label: str
    values: Values
    """A whole configuration; the seed and, with ``slicegpt_size``, the model are put in later."""
    slicegpt_size: int | None = None
    """Units that SliceGPT leaves of the residual stream of the model, before the run."""

    def config(self, seed: int, model: str | None = None) -> RunConfig:
        """The configuration of one run."""
        values = deepcopy(self.values) | {"seed": seed, "name": f"{self.name}-seed{seed}"}
        if model is not None:
            values["model"] = values["model"] | {"path": model, "parent": values["model"]["path"]}
        return parse_config(values, f"study row {self.name}")


@dataclass(frozen=True)
class Study:
    """A question and its rows."""

    name: str
    question: str
    rows: list[Row]
    reference: str
    """Name of the row that the others are compared with."""
    notes: list[str] = field(default_factory=list)


def _values(config: RunConfig) -> Values:
    if config.recovery_of_cycle:
        raise ConfigError(
            "a study gives every row the same recovery, but the recipe has recovery_of_cycle; leave it out"
        )
    values = config.model_dump(mode="json")
    # A comparison on equal steps: the gate may judge, and may not act.
    values["gate"] = values["gate"] | {"max_extensions": 0, "max_retries": 0, "on_failure": "continue"}
    values["recovery_if_unlearnable"] = []
    for entry in values["recovery"]:
        if "min_learnable_fraction" in entry:
            entry["min_learnable_fraction"] = 0.0
    return values


def cuts_of(config: RunConfig) -> int:
    """How many cuts the recipe plans, each of which reads ``calibration.sequences``; of a governed pace that is one."""
    schedule = config.schedule
    if schedule.mode == "in_place" and schedule.pace != "governed":
        return len(schedule.cuts_in_order)
    return len(planned_cuts(schedule))


def _with_steps(values: Values, config: RunConfig, weights: list[float]) -> Values:
    """The recipe's steps in all, for every recovery, shared out to cycles by ``weights``."""
    result = deepcopy(values)
    for part, entry in enumerate(result["recovery"]):
        total = sum(recovery_steps(config, cut.planned, part) for cut in planned_cuts(config.schedule))
        entry["steps"] = shared_out(total, weights)
    return result


def shared_out(total: int, weights: list[float]) -> list[int]:
    """Whole numbers, at least 1 each, in proportion to ``weights``, which add up to ``total``.

    Raises:
        ConfigError: there are fewer than weights.
    """
    if total < len(weights):
        raise ConfigError(f"{total} recovery steps cannot be shared out to {len(weights)} cycles; give the recipe more")
    spare, whole = total - len(weights), sum(weights)
    exact = [spare * weight / whole for weight in weights]
    floors = [int(value) for value in exact]
    by_rest = sorted(range(len(weights)), key=lambda i: (floors[i] - exact[i], i))
    for index in by_rest[: spare - sum(floors)]:
        floors[index] += 1
    return [1 + value for value in floors]


def _schedule(values: Values, **changes: Any) -> Values:
    """With another schedule; one in cycles has no last cut in place, after which a learning rate could fall."""
    kept, changed = {"alignment": values["schedule"]["alignment"]}, deepcopy(values)
    if changes.get("mode") != "in_place":
        for entry in changed["recovery"]:
            if entry.get("learning_rate_schedule") == AFTER_CUTS:
                entry["learning_rate_schedule"] = "cosine"
    return changed | {"schedule": kept | changes}


def _criterion(values: Values, **changes: Any) -> Values:
    plain = {key: values["criterion"][key] for key in ("ridge", "stream_ridge")}
    return values | {"criterion": plain | changes}


def _calibration(values: Values, **changes: Any) -> Values:
    return values | {"calibration": values["calibration"] | changes}


def target_shape(config: RunConfig, shape: ModelShape) -> ModelShape:
    """What the recipe makes of a model."""
    return shape.sliced(config.schedule.channels_sum, config.schedule.layers_total)


def blocks_for(shape: ModelShape, parameters: int) -> int:
    """How many blocks have to go for the nearest number of parameters; at least one goes, and one stays."""
    choices = range(1, shape.num_hidden_layers)
    return min(choices, key=lambda gone: abs(shape.sliced(layers=gone).parameters - parameters))


def slicegpt_shape(shape: ModelShape, hidden_size: int) -> ModelShape:
    """Of what SliceGPT leaves: a Llama, untied, with two more matrices per block."""
    return replace(
        shape,
        family=BASELINES["slicegpt_llama"],
        hidden_size=hidden_size,
        tied=False,
        attention_bias=shape.attention_bias or shape.family.qkv_bias,
    )


def slicegpt_size_for(shape: ModelShape, parameters: int, alignment: int = 8) -> int:
    """Units of the residual stream that are the nearest number of parameters."""
    sizes = range(alignment, shape.hidden_size + 1, alignment)
    return min(sizes, key=lambda size: abs(slicegpt_shape(shape, size).parameters - parameters))


def table1(config: RunConfig, shape: ModelShape) -> Study:
    """The loop against other ways to the same size, and the original, all with the same recovery."""
    values = _values(config)
    target = target_shape(config, shape).parameters
    in_place = config.schedule.mode == "in_place"
    label = f"{cuts_of(config)} cuts in one training" if in_place else f"{cuts_of(config)} cycles"
    once = _with_steps(values, config, [1.0])
    at_once: Values = {"channels_per_cycle": [config.schedule.channels_sum]} if config.schedule.channels_sum else {}
    layers = config.schedule.layers_total
    if layers:
        at_once |= {"layers_total": layers, "layers_per_cycle": layers, "order": "together"}
    all_sequences = config.calibration.sequences * cuts_of(config)
    gone = blocks_for(shape, target)
    rows = [
        Row("original", "original, recovered", _schedule(once, recover_only=True)),
        Row(
            "shortgpt",
            f"ShortGPT ({gone} of {shape.num_hidden_layers} blocks)",
            _calibration(
                _criterion(
                    _schedule(once, layers_total=gone, layers_per_cycle=gone), layers="cosine", compensate="none"
                ),
                sequences=all_sequences,
                token_weights="uniform",
            ),
        ),
    ]
    notes = [f"the loop leaves {target:,} parameters; the others come as near as whole blocks and units allow"]
    if shape.family.model_type in SLICEGPT_FAMILIES:
        size = slicegpt_size_for(shape, target)
        rows.append(
            Row(
                "slicegpt",
                f"SliceGPT ({size} of {shape.hidden_size} units)",
                _calibration(_schedule(once, recover_only=True), sequences=all_sequences),
                slicegpt_size=size,
            )
        )
    else:
        notes.append(f"no SliceGPT row: the method has no form for {shape.family.model_type}")
    rows += [
        Row("prune-once", "Prune-Once", _calibration(_schedule(once, **at_once), sequences=all_sequences)),
        Row(
            "prune-once-plain",
            "Prune-Once, the paper's Eq. 4, uncompensated",
            _calibration(
                _criterion(
                    _schedule(once, **at_once), channels="activation", layers="block_influence", compensate="none"
                ),
                sequences=all_sequences,
                token_weights="uniform",
            ),
        ),
        Row("ptl", f"PTL ({label})", values),
    ]
    return Study("table1", "Is the loop better than other ways to the same size?", rows, "ptl", notes)


def iterations(config: RunConfig, shape: ModelShape) -> Study:
    """The same channels in 1, 2, 4 and 8 equal cuts, with the same recovery steps in all."""
    values, total = _values(config), config.schedule.channels_sum
    _needs_channels(config, "iterations")
    alignment = config.schedule.alignment * config.resources.tensor_parallel_size
    all_sequences = config.calibration.sequences * cuts_of(config)
    rows = []
    for count in (1, 2, 4, 8):
        if total // alignment < count:
            continue
        widths = [alignment * part for part in shared_out(total // alignment, [1.0] * count)]
        cut = _schedule(_with_steps(values, config, [1.0] * count), channels_per_cycle=widths)
        cut = _calibration(cut, sequences=max(1, all_sequences // count))
        rows.append(Row(f"cuts-{count}", f"{count} cut{'s' * (count > 1)}", cut))
    return Study("iterations", "Do more, smaller cuts keep more?", rows, rows[0].name)


def step_size(config: RunConfig, shape: ModelShape) -> Study:
    """One cut of a given size, then all of the recipe's steps: how large may it be?"""
    _needs_channels(config, "step_size")
    values, width = _values(config), shape.intermediate_size
    alignment = config.schedule.alignment * config.resources.tensor_parallel_size
    rows = []
    for share in (0.125, 0.25, 0.5, 0.75):
        channels = round(width * share / alignment) * alignment
        if 0 < channels < width:
            cut = _schedule(_with_steps(values, config, [1.0]), channels_per_cycle=[channels])
            rows.append(Row(f"cut-{channels}", f"{channels} of {width} channels ({channels / width:.0%})", cut))
    return Study("step_size", "How large may one cut be?", rows, rows[0].name)


def order(config: RunConfig, shape: ModelShape) -> Study:
    """Channels first, blocks first, or in turns."""
    schedule = config.schedule
    if not schedule.layers_total or not schedule.channels_sum:
        raise ConfigError("study order: the recipe must remove channels and blocks (schedule.layers_total)")
    labels = {
        "channels_then_layers": "channels, then blocks",
        "layers_then_channels": "blocks, then channels",
        "alternating": "in turns",
        "together": "in the same cuts",
    }
    values, rows = _values(config), []
    all_sequences = config.calibration.sequences * cuts_of(config)
    for name, label in labels.items():
        changed = values | {"schedule": values["schedule"] | {"order": name}}
        count = len(planned_cuts(parse_config(changed).schedule))
        made = _with_steps(changed, config, [1.0] * count)
        rows.append(Row(name.replace("_", "-"), label, _calibration(made, sequences=max(1, all_sequences // count))))
    return Study("order", "In which order should channels and blocks go?", rows, rows[0].name)


def criteria(config: RunConfig, shape: ModelShape) -> Study:
    """The recipe's cuts by other criteria, with and without compensation."""
    _needs_channels(config, "criteria")
    values, rows = _values(config), []
    for channels in ("obs", "rms_contribution", "activation", "magnitude", "random"):
        for compensate in ("least_squares", "none"):
            plain = "" if compensate == "least_squares" else ", uncompensated"
            changed = _criterion(values, channels=channels, layers=config.criterion.layers, compensate=compensate)
            rows.append(Row(f"{channels}-{compensate}".replace("_", "-"), f"{channels}{plain}", changed))
    return Study("criteria", "Which channels should go?", rows, rows[0].name)


def code(config: RunConfig, shape: ModelShape) -> Study:
    """The same for programs, judged by unit tests."""
    if config.evaluation.judge != "reward" or config.reward.path is None:
        raise ConfigError(
            "study code: the recipe must judge programs by their unit tests (reward.path: code and "
            "evaluation.judge: reward)"
        )
    question = "Is the loop better than other ways to the same size, for programs?"
    return replace(table1(config, shape), name="code", question=question)


def table2(config: RunConfig, shape: ModelShape) -> Study:
    """CPT, RL, and CPT followed by RL."""
    chosen = [entry for entry in config.recovery if entry.method in ("cpt", "grpo")]
    if {entry.method for entry in chosen} != {"cpt", "grpo"}:
        raise ConfigError("study table2: the recipe's recovery must list cpt and grpo")
    study = recovery(config.model_copy(update={"recovery": chosen}), shape)
    return replace(study, name="table2", question="Is it CPT, RL, or one after the other?")


LABELS = {"cpt": "CPT", "grpo": "GRPO", "distill": "on-policy distillation"}


def recovery(config: RunConfig, shape: ModelShape) -> Study:
    """Every recovery that the recipe lists, alone, and CPT followed by GRPO if it lists both."""
    methods = [entry.method for entry in config.recovery]
    if len(set(methods)) < 2 or len(set(methods)) < len(methods):
        raise ConfigError(f"study recovery: the recipe's recovery is {methods}; list the methods to compare, each once")
    values, rows = _values(config), []
    for entry in values["recovery"]:
        rows.append(Row(entry["method"], LABELS[entry["method"]], values | {"recovery": [entry]}))
    by_method = {entry["method"]: entry for entry in values["recovery"]}
    if {"cpt", "grpo"} <= by_method.keys():
        both = [by_method[method] | {"steps": _half(by_method[method]["steps"])} for method in ("cpt", "grpo")]
        rows.append(Row("cpt-grpo", "CPT, then GRPO (half of each)", values | {"recovery": both}))
    return Study("recovery", "Which recovery gets most back?", rows, rows[0].name)


def rl(config: RunConfig, shape: ModelShape) -> Study:
    """Every recovery that the recipe lists, with its steps in all, on a model that nothing is cut from."""
    methods = [entry.method for entry in config.recovery]
    if len(set(methods)) < len(methods):
        raise ConfigError(f"study rl: the recipe's recovery is {methods}; list each method once")
    if any(isinstance(entry, DistillConfig) and not entry.rewards for entry in config.recovery):
        raise ConfigError(
            "study rl: nothing is cut, so the parent of a distillation is the model itself, and only rewards can teach "
            "it anything: set rewards: true for distill, or leave it out"
        )
    values = _schedule(_with_steps(_values(config), config, [1.0]), recover_only=True)
    entries = {entry["method"]: entry for entry in values["recovery"]}
    rows = [Row(name, LABELS[name], values | {"recovery": [entry]}) for name, entry in entries.items()]
    return Study("rl", "What does each recovery add to a model that is not cut?", rows, rows[0].name)


def pace(config: RunConfig, shape: ModelShape) -> Study:
    """One cut, cuts of equal shares at equal distances, and cuts that find their own pace, with the same steps."""
    schedule = config.schedule
    if schedule.pace != "governed":
        raise ConfigError("study pace: the recipe's schedule.pace must be governed; the other rows are made from it")
    values, total, width = _values(config), schedule.channels_sum, shape.intermediate_size
    alignment = schedule.alignment * config.resources.tensor_parallel_size
    cuts = geometric(width, total, EQUAL_CUTS, alignment)
    in_turns = _with_steps(values, config, [1.0] * len(cuts))
    once = _schedule(values, channels_per_cycle=[total])
    # There are no rollouts to read before the only cut.
    once = _calibration(once, source="corpus", sequences=config.calibration.sequences * len(cuts))
    rows = [
        Row("once", "one cut", once),
        Row("geometric", f"{len(cuts)} cuts in place", _schedule(in_turns, mode="in_place", channels_per_cycle=cuts)),
        Row("governed", "cuts in place, governed", values),
    ]
    return Study("pace", "How fast may channels go, where only rewards can bring back what is lost?", rows, "once")


EQUAL_CUTS = 6
"""In the row of study `pace` whose cuts are fixed."""


def _half(steps: int | list[int]) -> int | list[int]:
    return [max(1, step // 2) for step in steps] if isinstance(steps, list) else max(1, steps // 2)


def _needs_channels(config: RunConfig, study: str) -> None:
    if not config.schedule.channels_sum:
        raise ConfigError(f"study {study}: the recipe must remove channels (schedule.channels_per_cycle)")


STUDIES: dict[str, Callable[[RunConfig, ModelShape], Study]] = {
    study.__name__: study
    for study in (table1, table2, iterations, step_size, order, code, criteria, recovery, rl, pace)
}


def design(name: str, config: RunConfig, shape: ModelShape) -> Study:
    """The study of this name on a recipe.

    Raises:
        ConfigError: no such study, or a recipe that it cannot vary.
    """
    if name not in STUDIES:
        raise ConfigError(f"study {name!r}: there are {', '.join(STUDIES)}")
    if shape.family.model_type not in FAMILIES:
        raise ConfigError(f"study {name}: {shape.family.model_type} is a baseline's model; name one that can be pruned")
    return STUDIES[name](config, shape)
