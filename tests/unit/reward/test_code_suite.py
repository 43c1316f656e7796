"""A hundred and more programs, each with its verdict: the honest are paid, the hostile are not, nothing is harmed."""

import time
from pathlib import Path

import pytest
import yaml
from hostile import run

from reward.programs.sandbox import Limits, Sandbox
from reward.programs.unit_tests import plan_tests

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")
SANDBOX = Sandbox(Limits(cpu_seconds=2, wall_seconds=10))  # a busy machine takes seconds to start a process
CASES = yaml.safe_load(Path(__file__).with_name("programs.yaml").read_text(encoding="utf-8"))


def ground_truth(case):
    return {key: case[key] for key in ("tests", "setup", "entry") if key in case}


def cases(verdict):
    return [pytest.param(case, id=case["name"]) for case in CASES if case["verdict"] == verdict]


def judged(case):
    start = time.monotonic()
    outcome = run(case["program"], plan_tests(ground_truth(case)), SANDBOX)
    assert time.monotonic() - start < 30
    return outcome


def test_the_suite_is_whole():
    assert len(CASES) == len({case["name"] for case in CASES}) >= 120
    assert {case["verdict"] for case in CASES} == {"paid", "unpaid", "refused"}


@pytest.mark.parametrize("case", cases("paid"))
def test_what_is_right_is_paid(case):
    outcome = judged(case)
    assert all(outcome.passed), outcome


@pytest.mark.parametrize("case", cases("unpaid"))
def test_what_is_not_solved_is_not_paid(case):
    outcome = judged(case)
    assert not all(outcome.passed), outcome


@pytest.mark.parametrize("case", cases("refused"))
def test_tests_that_would_leave_the_verdict_to_the_program_are_refused(case):
    with pytest.raises(ValueError, match=case["message"]):
        plan_tests(ground_truth(case))
