"""The built-in score and the sum it is made of."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.combine import weighted_sum
from reward.compute_score import KEYS, compute_score

FINITE = st.floats(-1e6, 1e6)


@given(st.dictionaries(st.text(max_size=3), st.tuples(FINITE, FINITE), max_size=5))
def test_weighted_sum_is_the_dot_product(pairs):
    parts = {name: part for name, (part, _) in pairs.items()}
    weights = {name: weight for name, (_, weight) in pairs.items()}
    expected = math.fsum(part * weight for part, weight in pairs.values())
    assert weighted_sum(parts, weights) == expected


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        (
            {"acc": 1.0},
            {"accuracy": 1.0},
            r"without a weight: \['acc'\]; weights without a part: \['accuracy'\]",
        ),
        ({"acc": 1.0, "format": 1.0}, {"acc": 1.0}, r"\['format'\]"),
        ({"acc": math.nan}, {"acc": 1.0}, "reward part 'acc' is nan"),
        ({"acc": 1.0}, {"acc": math.inf}, "weight 'acc' is inf"),
        ({"acc": "1"}, {"acc": 1.0}, "reward part 'acc' is '1'"),
    ],
)
def test_weighted_sum_refuses_to_guess(parts, weights, message):
    with pytest.raises(ValueError, match=message):
        weighted_sum(parts, weights)


@pytest.mark.parametrize(
    ("response", "acc", "form"),
    [
        (r"\boxed{4}", 1.0, 1.0),
        (r"\boxed{5}", 0.0, 1.0),
        ("\\boxed{4}\nWait, let me see.", 1.0, 0.0),
        ("4", 0.0, 0.0),
    ],
)
def test_score_is_nine_tenths_accuracy_and_one_tenth_format(response, acc, form):
    result = compute_score("math", response, "4", {"index": 0})
    assert result == {"score": pytest.approx(0.9 * acc + 0.1 * form), "acc": acc, "format": form}
    assert result.keys() == {"score", *KEYS}


def test_settings_reach_the_score():
    settings = {"accuracy_weight": 2.0, "format_weight": 0.5, "format_style": "think_boxed"}
    assert compute_score("math", r"<think>2+2</think>\boxed{4}", "4", **settings)["score"] == 2.5
    assert compute_score("math", r"\boxed{4}", "4", **settings)["score"] == 2.0
    assert compute_score("math", r"2+2</think>\boxed{4}", "4", **settings, think_opened=True)["score"] == 2.5


def test_a_misspelt_setting_is_refused_and_verls_own_arguments_are_not():
    compute_score("math", r"\boxed{4}", "4", reward_router_address="a:1", reward_model_tokenizer=None)
    with pytest.raises(TypeError, match="acuracy_weight"):
        compute_score("math", r"\boxed{4}", "4", acuracy_weight=1.0)


@pytest.mark.parametrize(
    "module", ["accuracy", "boxed", "check", "combine", "compute_score", "style", "guard", "load", "user"]
)
def test_each_file_imports_alone_and_without_the_stack(module):
    script = (
        f"import sys; import reward.{module}; "
        "heavy = {'ptl_rl', 'torch', 'ray', 'verl', 'numpy', 'math_verify', 'sympy'} & sys.modules.keys(); "
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
