"""The YAML of a first recipe, a comment behind every line that its user may want to change."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from ptl_rl.config import RewardConfig, ScheduleConfig
from ptl_rl.planning.first_settings import Batches, Lengths

Method = Literal["grpo", "cpt", "distill"]
METHODS = {
    "grpo": "RL from rewards of the policy's own responses; or cpt, distill, or several (docs/recovery.md)",
    "cpt": "continued pre-training on the data themselves; or grpo, distill, or several (docs/recovery.md)",
    "distill": "learns from the unpruned parent; or grpo, cpt, or several (docs/recovery.md)",
}
LEARNING_RATES = {"grpo": "1.0e-6", "cpt": "5.0e-6", "distill": "1.0e-6"}
TESTBED_LEARNING_RATES = {"grpo": "5.0e-5", "cpt": "5.0e-5", "distill": "1.0e-4"}
WIDEST = 128


@dataclass(frozen=True)
class Facts:
    """All that goes into the text."""

    name: str
    model: str
    is_testbed: bool
    """Whether the model is a shipped tiny one."""
    width: int
    schedule: ScheduleConfig
    cycles: int
    data: str
    train: dict[str, Any]
    """The source, as the recipe has it."""
    noticed: str
    """Of the data; empty where there is nothing to say."""
    evaluation: dict[str, dict[str, Any]]
    """Sources of validation and test, where rows of train cannot be held out for them."""
    evaluation_why: str
    recovery: Method
    max_tokens: int
    """Of a sequence of continued pre-training."""
    calibration_tokens: int | None
    """All that the model can read, where that is little."""
    suffix: str
    reward: RewardConfig | None
    workers: int
    parallel: int
    has_gpus: bool
    rows: int = 0
    subset: int = 0
    """Rows of the smallest cycle's part."""
    batches: Batches = field(default_factory=lambda: Batches(1, 1, 1))
    lengths: Lengths = field(default_factory=lambda: Lengths(128, 128))


def recipe_text(facts: Facts) -> str:
    """The recipe."""
    removed = f"{facts.schedule.channels_sum / facts.width:.0%} of its FFN channels in {facts.cycles} cycles"
    what = f"{facts.model} loses {removed}, each recovered with {facts.recovery} on {facts.data}."
    lines = [
        _comment(what),
        _comment(
            "Written by `ptl init`. What is not here has a default. `ptl plan` and `ptl data` show what it comes to."
        ),
        _line(0, f"name: {facts.name}", "of the run's folder and its report"),
        *_model(facts),
        *_data(facts),
        *_schedule(facts),
        *_recovery(facts),
        *_reward(facts),
        *_resources(facts),
    ]
    return "\n".join(lines) + "\n"


def _comment(text: str, depth: int = 0) -> str:
    return f"{'  ' * depth}# {' '.join(text.split())}"


def _line(depth: int, text: str, why: str = "") -> str:
    comment = f" # {' '.join(why.split())}" if why else ""
    return f"{'  ' * depth}{text}{comment}"


def _flow(values: dict[str, Any] | list[Any]) -> str:
    dumped: str = yaml.safe_dump(
        values, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True
    )
    return dumped.strip()


def _scalar(value: str) -> str:
    return _flow([value])[1:-1]


def _model(facts: Facts) -> list[str]:
    dtype = "float32" if facts.is_testbed else "bfloat16"
    return [
        "model:",
        _line(1, f"path: {_scalar(facts.model)}", "a Hugging Face folder, a hub id, or testbed:NAME"),
        _line(1, f"dtype: {dtype}", "of forward passes and rollouts; bfloat16 or float32"),
    ]


def _data(facts: Facts) -> list[str]:
    lines = ["data:"]
    if facts.noticed:
        lines.append(_comment(f"{facts.noticed}.", 1))
    lines.append(_line(1, f"train: {_flow(facts.train)}", f"{facts.rows:,} rows can be used"))
    if facts.evaluation:
        lines.append(_comment(facts.evaluation_why, 1))
        lines += [_line(1, f"{name}: {_flow(source)}") for name, source in facts.evaluation.items()]
    else:
        lines += [
            _comment(
                "Without validation and test, rows of train are held out for them. Better: problems of your own.", 1
            ),
            _comment("validation: {path: my_validation.jsonl} # followed during RL", 1),
            _comment("test: {path: my_test.jsonl} # its accuracy is reported, and the gate decides by it", 1),
        ]
    programs = facts.reward is not None and facts.reward.path == "code"
    if facts.is_testbed and not programs:
        lines.append(_line(1, 'prompt_suffix: ""', "said after every question; this model has learnt to do without"))
    if facts.suffix:
        lines.append(_comment("Said after every question, as answers are looked for in the box:", 1))
        lines.append(_line(1, f"prompt_suffix: {json.dumps(facts.suffix)}"))
    lines += [
        _line(1, f"max_prompt_tokens: {facts.lengths.prompt}", "room for the longest; RL leaves longer questions out"),
        _line(
            1, f"max_response_tokens: {facts.lengths.response}", "longer ones are cut off: as much as your model thinks"
        ),
    ]
    if facts.calibration_tokens is not None:
        what = f"calibration: {{max_tokens: {facts.calibration_tokens}}}"
        lines.append(_line(0, what, "of a sequence that is scored: as much as the model can read"))
    return lines


def _schedule(facts: Facts) -> list[str]:
    schedule, width = facts.schedule, facts.width
    step, total = schedule.channels_per_cycle, schedule.channels_sum
    assert isinstance(step, int)
    unit = schedule.alignment * facts.parallel
    lines = [
        "schedule:",
        _line(
            1,
            f"channels_per_cycle: {step}",
            f"of {width} a layer, in multiples of {unit}; smaller cuts lose less, in more cycles",
        ),
        _line(1, f"channels_total: {total}", f"{total / width:.0%}, in {facts.cycles} cycles"),
    ]
    if schedule.alignment != WIDEST:
        lines.append(
            _line(1, f"alignment: {schedule.alignment}", f"{width} is no suitable multiple of the usual {WIDEST}")
        )
    return lines


def _recovery(facts: Facts) -> list[str]:
    found, method = facts.batches, facts.recovery
    per_step = "sequences_per_step" if method == "cpt" else "prompts_per_step"
    rates = TESTBED_LEARNING_RATES if facts.is_testbed else LEARNING_RATES
    one_pass = f"a cycle: one pass over the {facts.subset:,} rows that are its own"
    if found.whole_pass > found.steps:
        one_pass = f"a cycle; one pass over the {facts.subset:,} rows that are its own would be {found.whole_pass:,}"
    lines = [
        "recovery:",
        _line(1, f"- {method}:", METHODS[method]),
        _line(4, f"steps: {found.steps}", one_pass)[2:],
    ]
    settings = [(f"{per_step}: {found.per_step}", "more is steadier and slower")]
    if method == "grpo":
        settings.append(("rollouts_per_prompt: 8", "responses that are compared with one another"))
    if method == "cpt":
        settings.append((f"max_tokens: {facts.max_tokens}", "of a sequence; a longer text becomes several"))
    settings.append(
        (f"learning_rate: {rates[method]}", "raise it if accuracy does not come back, lower it if it drops")
    )
    return lines + [_line(3, text, why) for text, why in settings]


def _reward(facts: Facts) -> list[str]:
    reward = facts.reward
    if reward is None:
        if facts.recovery == "cpt":
            return []
        return [_comment("reward: {path: my_reward.py, name: my_score} # default: 0.9 right answer + 0.1 in a box")]
    if reward.path == "code":
        return [
            _line(0, "reward: {path: code}", "runs every program against its unit tests (docs/code_reward.md)"),
            _line(0, "evaluation: {judge: reward}", "accuracy is the share of programs that pass"),
        ]
    return [
        _line(0, f"reward: {_flow({'path': reward.path, 'name': reward.name})}", "your function, in verl's signature"),
        _comment("evaluation: {judge: reward} # accuracy by it, too (0 to 1), in place of answers in a box"),
    ]


def _resources(facts: Facts) -> list[str]:
    whose = "GPUs of a node" if facts.has_gpus else "no GPU was found here: one process on CPUs. On GPUs, how many"
    lines = [
        "resources:",
        _line(1, "device: auto", "GPUs where there are any, else CPUs; or cuda, cpu"),
        _line(1, f"workers_per_node: {facts.workers}", whose),
    ]
    if facts.parallel > 1:
        lines.append(
            _line(1, f"tensor_parallel_size: {facts.parallel}", "GPUs that share one copy of the model in vLLM")
        )
    return [*lines, _comment("gpu: h200 # what `ptl plan` counts with where the machine has no GPU", 1)]
