"""The YAML of a first recipe, a comment behind every line that its user may want to change."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from ptl_rl.config import RewardConfig, ScheduleConfig
from ptl_rl.planning.first_settings import WIDEST_ALIGNMENT, Batches, Lengths, Workers

Method = Literal["grpo", "cpt", "distill"]
METHODS = {
    "grpo": "RL from rewards of the policy's own responses; or cpt, distill, or several (docs/recovery.md)",
    "cpt": "continued pre-training on the data themselves; or grpo, distill, or several (docs/recovery.md)",
    "distill": "learns from the unpruned parent; or grpo, cpt, or several (docs/recovery.md)",
}
LEARNING_RATES = {"grpo": "1.0e-6", "cpt": "5.0e-6", "distill": "1.0e-6"}
TESTBED_LEARNING_RATES = {"grpo": "5.0e-5", "cpt": "5.0e-5", "distill": "1.0e-4"}


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
    workers: Workers
    rows: int = 0
    subset: int = 0
    """Rows of the smallest cycle's part."""
    batches: Batches = field(default_factory=lambda: Batches(1, 1, 1))
    lengths: Lengths = field(default_factory=lambda: Lengths(128, 128))


def recipe_text(facts: Facts) -> str:
    """The recipe."""
    removed = f"{facts.schedule.channels_sum / facts.width:.0%} of its FFN channels in {facts.cycles} cycles"
    dtype = "float32" if facts.is_testbed else "bfloat16"
    lines = [
        _comment(f"{facts.model} loses {removed}, each recovered with {facts.recovery} on {facts.data}."),
        "# Written by `ptl init`. What is not here has a default. `ptl plan` and `ptl data` show what it comes to.",
        f"name: {facts.name} # of the run's folder and its report",
        "model:",
        f"  path: {_flow([facts.model])[1:-1]} # a Hugging Face folder, a hub id, or testbed:NAME",
        f"  dtype: {dtype} # of forward passes and rollouts; bfloat16 or float32",
        *_data(facts),
        *_schedule(facts),
        *_recovery(facts),
        *_reward(facts),
        *_resources(facts.workers),
    ]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """One line, whatever is in the names that it quotes."""
    return f"# {' '.join(text.split())}"


def _flow(values: dict[str, Any] | list[Any]) -> str:
    dumped: str = yaml.safe_dump(
        values, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True
    )
    return dumped.strip()


def _data(facts: Facts) -> list[str]:
    lines = ["data:"]
    if facts.noticed:
        lines.append("  " + _comment(f"{facts.noticed}."))
    lines.append(f"  train: {_flow(facts.train)} # {facts.rows:,} rows can be used")
    if facts.evaluation:
        lines.append("  " + _comment(facts.evaluation_why))
        lines += [f"  {name}: {_flow(source)}" for name, source in facts.evaluation.items()]
    else:
        lines += [
            "  # Without validation and test, rows of train are held out for them. Better: problems of your own.",
            "  # validation: {path: my_validation.jsonl} # followed during RL",
            "  # test: {path: my_test.jsonl} # its accuracy is reported, and the gate decides by it",
        ]
    if facts.is_testbed and (facts.reward is None or facts.reward.path != "code"):
        lines.append('  prompt_suffix: "" # said after every question; this model has learnt to do without')
    if facts.suffix:
        lines.append("  # Said after every question, as answers are looked for in the box:")
        lines.append(f"  prompt_suffix: {json.dumps(facts.suffix)}")
    prompt, response = facts.lengths.prompt, facts.lengths.response
    lines.append(f"  max_prompt_tokens: {prompt} # room for the longest; RL leaves longer questions out")
    lines.append(f"  max_response_tokens: {response} # longer ones are cut off: as much as your model thinks")
    if (most := facts.calibration_tokens) is not None:
        lines.append(
            f"calibration: {{max_tokens: {most}}} # of a sequence that is scored: as much as the model can read"
        )
    return lines


def _schedule(facts: Facts) -> list[str]:
    schedule, width = facts.schedule, facts.width
    step, total = schedule.channels_per_cycle, schedule.channels_sum
    unit = f"in multiples of {schedule.alignment * facts.workers.parallel}"
    lines = [
        "schedule:",
        f"  channels_per_cycle: {step} # of {width} a layer, {unit}; smaller cuts lose less, in more cycles",
        f"  channels_total: {total} # {total / width:.0%}, in {facts.cycles} cycles",
    ]
    if schedule.alignment != WIDEST_ALIGNMENT:
        why = f"{width} is no suitable multiple of the usual {WIDEST_ALIGNMENT}"
        lines.append(f"  alignment: {schedule.alignment} # {why}")
    return lines


def _recovery(facts: Facts) -> list[str]:
    found, method = facts.batches, facts.recovery
    rates = TESTBED_LEARNING_RATES if facts.is_testbed else LEARNING_RATES
    one_pass = f"a cycle: one pass over the {facts.subset:,} rows that are its own"
    if found.whole_pass > found.steps:
        one_pass = f"a cycle; one pass over the {facts.subset:,} rows that are its own would be {found.whole_pass:,}"
    of_step = "sequences_per_step" if method == "cpt" else "prompts_per_step"
    lines = [
        "recovery:",
        f"  - {method}: # {METHODS[method]}",
        f"      steps: {found.steps} # {one_pass}",
        f"      {of_step}: {found.per_step} # more is steadier and slower",
    ]
    if method == "grpo":
        lines.append("      rollouts_per_prompt: 8 # responses that are compared with one another")
    if method == "cpt":
        lines.append(f"      max_tokens: {facts.max_tokens} # of a sequence; a longer text becomes several")
    why = "raise it if accuracy does not come back, lower it if it drops"
    return [*lines, f"      learning_rate: {rates[method]} # {why}"]


def _reward(facts: Facts) -> list[str]:
    reward = facts.reward
    if reward is None:
        named = "# reward: {path: my_reward.py, name: my_score} # default: 0.9 right answer + 0.1 in a box"
        return [] if facts.recovery == "cpt" else [named]
    if reward.path == "code":
        return [
            "reward: {path: code} # runs every program against its unit tests (docs/code_reward.md)",
            "evaluation: {judge: reward} # accuracy is the share of programs that pass",
        ]
    return [
        f"reward: {_flow({'path': reward.path, 'name': reward.name})} # your function, in verl's signature",
        "# evaluation: {judge: reward} # accuracy by it, too (0 to 1), in place of answers in a box",
    ]


def _resources(workers: Workers) -> list[str]:
    whose = "GPUs of a node" if workers.on_gpus else "no GPU was found here: one process on CPUs. On GPUs, how many"
    lines = [
        "resources:",
        "  device: auto # GPUs where there are any, else CPUs; or cuda, cpu",
        f"  workers_per_node: {workers.count} # {whose}",
    ]
    if workers.parallel > 1:
        lines.append(f"  tensor_parallel_size: {workers.parallel} # GPUs that share one copy of the model in vLLM")
    return [*lines, "  # gpu: h200 # what `ptl plan` counts with where the machine has no GPU"]
