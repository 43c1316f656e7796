import json

import pytest

from ptl_rl.config import ConfigError, SourceConfig
from ptl_rl.data.records import DataError
from ptl_rl.evaluation import task_data
from ptl_rl.evaluation.tasks import TASKS, find_tasks, read_task

GSM8K = [{"question": f"How much is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(5)]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def test_rows_keep_their_order_and_a_limit_takes_the_first(tmp_path):
    source = write(tmp_path / "a.jsonl", GSM8K)
    found = task_data.read_documents([source], task_data.gsm8k_document, 3)
    assert [document["question"] for document in found.documents] == [row["question"] for row in GSM8K[:3]]


def test_the_projects_own_columns_give_the_same_documents(tmp_path):
    own = [{"question": row["question"], "solution": s, "answer": a} for row in GSM8K for s, a in [_parts(row)]]
    hub = task_data.read_documents([write(tmp_path / "hub.jsonl", GSM8K)], task_data.gsm8k_document, None)
    ours = task_data.read_documents([write(tmp_path / "own.jsonl", own)], task_data.gsm8k_document, None)
    assert ours.documents == hub.documents


def _parts(row):
    solution, _, answer = row["answer"].partition("\n#### ")
    return solution, answer


def test_parquet_and_jsonl_give_the_same_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GSM8K), tmp_path / "a.parquet")
    lines = task_data.read_documents([write(tmp_path / "a.jsonl", GSM8K)], task_data.gsm8k_document, None)
    source = SourceConfig(path=str(tmp_path / "a.parquet"))
    assert task_data.read_documents([source], task_data.gsm8k_document, None).documents == lines.documents


def test_several_sources_are_read_in_turns(tmp_path):
    first = write(tmp_path / "first.jsonl", GSM8K[:3])
    second = write(tmp_path / "second.jsonl", GSM8K[3:])
    found = task_data.read_documents([first, second], task_data.gsm8k_document, None).documents
    assert [document["question"] for document in found] == [GSM8K[i]["question"] for i in (0, 3, 1, 4, 2)]
    assert len(task_data.read_documents([first, second], task_data.gsm8k_document, 2).documents) == 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{broken", r"a\.jsonl:2: not valid JSON"),
        ("[1]", r"a\.jsonl:2: not an object but list"),
        ({"answer": "#### 4"}, r"a\.jsonl:2: no column 'question'; the row has answer"),
        ({"question": " ", "answer": "#### 4"}, r"a\.jsonl:2: column 'question' is empty"),
        ({"question": "how?", "answer": "4"}, r"a\.jsonl:2: no column 'solution'"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, says):
    source = write(tmp_path / "a.jsonl", [GSM8K[0], row])
    with pytest.raises(DataError, match=says):
        task_data.read_documents([source], task_data.gsm8k_document, None)
    assert len(task_data.read_documents([source], task_data.gsm8k_document, 1).documents) == 1


def test_a_solution_without_a_box_is_no_question_of_math(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"problem": "1+1?", "solution": "it is 2"}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*boxed"):
        read_task(TASKS["math500"], [source], None)


def test_examples_of_the_prompt_are_not_asked(tmp_path):
    from ptl_rl.verl_patches.lm_eval_tasks import task_definition

    task = TASKS["gsm8k"]
    example = task_definition(task.definition)["fewshot_config"]["samples"][0]
    shown = {"question": example["question"].replace(" ", "  ", 1), "answer": "so 6\n#### 6"}
    found = read_task(task, [write(tmp_path / "a.jsonl", [shown, *GSM8K])], 2)
    assert [document["question"] for document in found.documents] == [row["question"] for row in GSM8K[:2]]
    assert found.left_out == 1
    with pytest.raises(DataError, match="no questions but 1 of the prompt's own"):
        read_task(task, [write(tmp_path / "b.jsonl", [shown])], None)


def test_questions_of_the_test_bed(tmp_path):
    found = read_task(TASKS["boxed"], [SourceConfig(path="testbed:test")], 4)
    assert len(found.documents) == 4
    assert all(document["answer"].strip() for document in found.documents)


def test_a_task_that_does_not_exist_is_guessed():
    with pytest.raises(ConfigError, match="did you mean 'math500'"):
        find_tasks(["math50"])
    with pytest.raises(ConfigError, match="name each task once"):
        find_tasks(["gsm8k", "gsm8k"])
    assert [task.name for task in find_tasks(["mbpp", "gsm8k"])] == ["mbpp", "gsm8k"]
