"""Which of a recovery's responses are kept for the next cycle, and what a cycle is then scored on."""

import json

import pytest

from ptl_rl.config.recipe import load_config
from ptl_rl.data import rollouts
from ptl_rl.data.corpora import DataError, Record
from ptl_rl.pruning.score.texts import calibration_texts
from ptl_rl.stage import StageSpec

RECORDS = [Record(f"question {i}", f"solution {i}", str(i), "here", str(i)) for i in range(8)]


def dump(folder, step: int, rows: list[tuple[int, str, float]]) -> None:
    folder.mkdir(exist_ok=True)
    lines = [{"input": f"user question {i}", "output": text, "score": score} for i, text, score in rows]
    (folder / f"{step}.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def latest(folder, rows: int) -> list[rollouts.Rollout]:
    def prompt_of(record: Record) -> str:
        return f"user {record.question}"

    return rollouts.keep_latest(folder, RECORDS, prompt_of, lambda text: text != "cut off", rows)


def test_the_latest_whole_and_rewarded_responses_are_kept(tmp_path):
    dump(tmp_path / "d", 9, [(0, "older\u2028\x85 lines", 1.0)])
    rows = [
        (1, "right", 1.0),
        (1, "again", 1.0),
        (2, "wrong", 0.0),
        (3, "cut off", 0.9),
        (4, "half", 0.1),
        (99, "?", 1),
    ]
    dump(tmp_path / "d", 10, rows)
    found = latest(tmp_path / "d", 4)
    assert [(r.question, r.response, r.reward) for r in found] == [
        ("question 1", "right", 1.0),
        ("question 4", "half", 0.1),
        ("question 1", "again", 1.0),
        ("question 0", "older\u2028\x85 lines", 1.0),
    ]
    assert latest(tmp_path / "d", 1) == found[:1]
    rollouts.save(found, tmp_path)
    assert rollouts.load(tmp_path) == found


def test_a_broken_file_is_named_with_its_line(tmp_path):
    (tmp_path / rollouts.FILE).write_text('{"question": "a", "response": "b", "reward": 1}\n{"question": 3\n')
    with pytest.raises(DataError, match=r"rollouts\.jsonl:2: not a kept rollout"):
        rollouts.load(tmp_path)


@pytest.mark.parametrize(
    ("source", "own", "expected"),
    [("corpus", 6, 0), ("rollouts", 6, 4), ("both", 6, 2), ("rollouts", 3, 3), ("rollouts", 0, 0)],
)
def test_worked_solutions_make_up_the_number(source, own, expected, repository, tmp_path):
    settings = [f"calibration.source={source}", "calibration.sequences=4", "data.prompt_suffix=' Think.'"]
    config = load_config(repository / "recipes/demo_restart_cpu.yaml", settings)
    if own:
        rollouts.save([rollouts.Rollout(f"own {i}", f"response {i}", 0.5) for i in range(own)], tmp_path)
    texts = calibration_texts(config, StageSpec.model_construct(source=tmp_path), RECORDS)
    assert texts.rollouts == expected and len(texts.questions) == 4
    assert sorted(texts.weights) == [0.5] * expected + [1.0] * (4 - expected)
    own_questions = [question for question in texts.questions if question.startswith("own")]
    assert own_questions == [f"own {i} Think." for i in range(expected)]
    assert set(texts.questions) - set(own_questions) == {f"question {i} Think." for i in range(4 - expected)}
    if source == "both":  # whoever reads only the first two reads both kinds
        assert texts.weights[:2] == [0.5, 1.0]
