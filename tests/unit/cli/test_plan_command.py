"""``ptl plan`` as a command: table and JSON say the same, and what cannot be planned is refused in a sentence."""

import json

import pytest
from typer.testing import CliRunner

from ptl_rl.cli import app

SMALL = ["--gpu", "rtx4090", "--set", "resources.workers_per_node=1"]


@pytest.fixture
def plan(repository):
    """Status and output of the command on a recipe of the repository."""

    def run(recipe: str, *arguments: str) -> tuple[int, str]:
        path = str(repository / f"recipes/{recipe}.yaml")
        result = CliRunner().invoke(app, ["plan", path, *arguments])
        return result.exit_code, result.output

    return run


def test_table_and_json_say_the_same(plan):
    status, table = plan("cpt_llama3-8b_4xa100", "--price-per-gpu-hour", "2")
    assert status == 0
    found = json.loads(plan("cpt_llama3-8b_4xa100", "--price-per-gpu-hour", "2", "--json")[1])
    assert "planned for 4 x A100 80 GB (79.1 GiB each)" in table and found["device"]["count"] == 4
    assert f"hours: {found['hours']:.1f} in all" in table
    assert f"price: {found['price']:,.0f} at 2 per GPU and hour" in table
    assert f"disk: {found['disk']['kept_gib']:.1f} GiB stay, {found['disk']['peak_gib']:.1f} GiB at most" in table
    for cycle in found["cycles"]:
        assert f"{cycle['parameters']:,}" in table
    for phase in found["memory"]:
        assert phase["phase"] in table and f"{phase['gib']:.1f}" in table


def test_what_does_not_fit_is_no_error_but_said_in_both(plan):
    status, table = plan("grpo_qwen2.5-7b_8xh200", *SMALL)
    assert status == 0
    problems = json.loads(plan("grpo_qwen2.5-7b_8xh200", *SMALL, "--json")[1])["will_not_fit"]
    assert problems and [line for line in table.splitlines() if line.startswith("will not fit: ")] == [
        f"will not fit: {problem}" for problem in problems
    ]


@pytest.mark.parametrize(
    ("recipe", "arguments", "said"),
    [
        ("grpo_qwen2.5-7b_8xh200", ["--gpu", "h20"], "error: --gpu: h20 is not known; known are h200, h100, a100-80"),
        (
            "demo_distill_cpu",
            ["--gpu", "h100"],
            "teacher_workers_per_node 1 leaves none of 1 GPUs a node to train; raise",
        ),
        ("none", [], "none.yaml: cannot read the recipe: No such file or directory"),
        (
            "demo_restart_cpu",
            ["--set", "schedule.alignment=100"],
            "which is not a multiple of 100 (alignment x tensor_",
        ),
        ("demo_restart_cpu", ["--set", "shedule.alignment=1"], "shedule: unknown key; did you mean 'schedule'?"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(plan, recipe, arguments, said):
    status, output = plan(recipe, *arguments)
    assert status == 2 and said in output and len(output.splitlines()) == 1
