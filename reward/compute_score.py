"""The built-in reward in verl's signature: 0.9 accuracy + 0.1 format, as in the paper's GRPO recovery.

Stock verl loads this file by its path: `reward.custom_reward_function.path=.../reward/compute_score.py`. It
does so without registering the module, hence no pickling and no dataclasses here, and the sibling imports
need the package `reward` to be installed (or on PYTHONPATH) in every Ray worker.
"""

from collections.abc import Mapping
from typing import Any

from reward.accuracy import accuracy_reward
from reward.combine import weighted_sum
from reward.style import format_reward

# What the dict holds beside `score`, for the guard: every sample of a batch must have the same keys.
KEYS = {"acc": "number", "format": "number"}
# verl adds these when a reward model is served beside the policy; a rule has no use for them.
FROM_VERL = {"reward_router_address", "reward_model_tokenizer"}


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | int | float,
    extra_info: Mapping[str, Any] | None = None,
    *,
    accuracy_weight: float = 0.9,
    format_weight: float = 0.1,
    format_style: str = "boxed",
    think_opened: bool = False,
    **kwargs: Any,
) -> dict[str, float]:
    """Return `score` (the weighted sum), `acc` and `format`, the last two 0.0 or 1.0.

    verl averages every key in validation and reports `acc` as its core metric. The keyword arguments come
    from `reward.custom_reward_function.reward_kwargs`. Raises TypeError for a setting that does not exist.
    """
    unknown = sorted(kwargs.keys() - FROM_VERL)
    if unknown:
        raise TypeError(
            f"unknown reward settings {unknown}: compute_score knows accuracy_weight, format_weight, format_style and "
            "think_opened"
        )
    parts = {
        "acc": accuracy_reward(solution_str, ground_truth),
        "format": format_reward(solution_str, format_style, think_opened),
    }
    score = weighted_sum(parts, {"acc": accuracy_weight, "format": format_weight})
    return {"score": score, **parts}
