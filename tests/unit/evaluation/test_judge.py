"""Whether an answer is right: by its boxed result, or by the run's own reward function."""

import json

import pytest
from data_rows import run_config

from ptl_rl.data.records import Record
from ptl_rl.evaluation.judge import JudgeError, judge

RECORDS = [Record(f"q{i}", f"s{i}", str(i), "source", f"r{i}") for i in range(4)]
OF_THE_USER = """
def score(data_source, solution_str, ground_truth, extra_info=None):
    {body}
"""


def user_file(tmp_path, body: str) -> str:
    """A file of its own: one that a process has loaded is not read again."""
    path = tmp_path / f"reward_{len(list(tmp_path.glob('reward_*.py')))}.py"
    path.write_text(OF_THE_USER.format(body=body))
    return str(path)


def judged_by(tmp_path, body: str, answers=("0", "1", "x", "3"), records=RECORDS):
    return judge(config(tmp_path, path=user_file(tmp_path, body), name="score"), records, answers)


def config(tmp_path, **reward):
    found = run_config(tmp_path)
    return found.model_copy(
        update={
            "evaluation": found.evaluation.model_copy(update={"judge": "reward"}),
            "reward": found.reward.model_copy(update=reward),
        }
    )


def test_boxed_answers(tmp_path):
    answers = ["\\boxed{0}", "so \\boxed{2/2}", "2", "\\boxed{4}"]
    assert judge(run_config(tmp_path), RECORDS, answers).correct == [1.0, 1.0, 0.0, 0.0]


def test_the_reward_function_judges_and_its_acc_comes_before_its_score(tmp_path):
    told = []
    body = "return {'score': 5.0, 'acc': float(solution_str == ground_truth) * (1 - extra_info['index'] / 4)}"
    verdicts = judge(
        config(tmp_path, path=user_file(tmp_path, body), name="score"),
        RECORDS,
        list("0123"),
        progress=lambda: told.append(1),
    )
    assert verdicts.correct == [1.0, 0.75, 0.5, 0.25] and verdicts.failed == 0
    assert len(told) == 4
    assert judged_by(tmp_path, "return float(solution_str == ground_truth)").correct == [1.0, 1.0, 0.0, 1.0]


def test_an_answer_it_raises_on_is_wrong_and_counted_and_all_of_them_are_an_error(tmp_path):
    verdicts = judged_by(tmp_path, "return float(int(solution_str) == int(ground_truth))")
    assert verdicts.correct == [1.0, 1.0, 0.0, 1.0] and verdicts.failed == 1
    with pytest.raises(JudgeError, match=r"raised on every answer; logs/reward_errors\.jsonl"):
        judged_by(tmp_path, "raise KeyError(solution_str)")


def test_the_score_counts_where_an_answer_has_no_acc(tmp_path):
    body = (
        "return {'score': 0.0} if solution_str == 'x' else {'score': 0.25, 'acc': float(solution_str == ground_truth)}"
    )
    assert judged_by(tmp_path, body).correct == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("number", ["-1.0", "1.5", "{'score': 0.5, 'acc': 2.0}", "{'score': 0.5, 'acc': 'yes'}"])
def test_numbers_that_are_no_share_are_refused(number, tmp_path):
    with pytest.raises(JudgeError, match="which is no share of being right; return a dict with a number 'acc'"):
        judged_by(tmp_path, f"return {number}")


def test_programs_are_run(tmp_path, repository):
    answer = json.dumps({"tests": ["assert twice(2) == 4", "assert twice(3) == 6"]})
    records = [Record("q", "s", answer, "mbpp", f"r{i}") for i in range(3)]
    answers = [f"```python\ndef twice(x):\n    return {body}\n```" for body in ("x + x", "x * x")] + ["twice"]
    verdicts = judge(config(tmp_path, path="code", name="compute_score"), records, answers)
    assert verdicts.correct == [1.0, 0.0, 0.0]
