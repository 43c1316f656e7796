"""Every setting is described, and ``docs/configuration.md`` says what the code says."""

import pytest

from ptl_rl.config import CptConfig, DistillConfig, EvalConfig, GrpoConfig, RunConfig, ScoreConfig
from ptl_rl.config.reference import reference, sections
from ptl_rl.config.verl_keys import TABLE

ROOTS = (RunConfig, ScoreConfig, EvalConfig, GrpoConfig, CptConfig, DistillConfig)


def every_section():
    return [(name, section) for root in ROOTS for name, section in [(root.__name__, root), *sections(root)]]


def test_every_field_has_a_description():
    assert {name for name, _ in every_section()} >= {"RunConfig", "data.train.fields", "criterion.contrast.data"}
    bare = [
        f"{place}.{name}"
        for place, section in every_section()
        for name, field in section.model_fields.items()
        if not field.description or not field.description.endswith(".")
    ]
    assert not bare, f"give {bare} a description in ptl_rl/config/: whole sentences, with the unit"


def test_the_page_is_what_the_code_says(repository):
    page = (repository / "docs" / "configuration.md").read_text()
    assert page == reference(), "python -m ptl_rl.config.reference > docs/configuration.md"


@pytest.mark.parametrize(
    "row",
    [
        "| `temperature` | number, above 0 | `1.0` | Sampling temperature of rollouts. "
        "| `actor_rollout_ref.rollout.temperature` |",
        "| `learning_rate` | number, above 0 | `5.0e-06` | Learning rate of AdamW, after the warm-up. | `optim.lr` |",
        "| `max_retries` | integer, at least 0 | `0` | Cycles taken back and tried again with half the cut, per run. |",
    ],
)
def test_a_row_has_bounds_default_and_keys(row):
    assert reference().count(row + "\n") == 1


def test_every_field_and_every_key_stands_on_the_page():
    lines = reference().splitlines()
    rows = {line.split("`")[1] for line in lines if line.startswith("| `")}
    assert rows == {name for _, section in every_section() for name in section.model_fields}
    page = "\n".join(lines)
    for row in TABLE:
        for key in (key for trainer in ("rl", "distill", "sft") for key in row.keys(trainer)):
            root, part, *rest = key.name.split(".")
            assert key.name in page or any(
                line.count(f"`{root}.{{") and part in line and line.count(".".join(rest)) for line in lines
            ), key.name
