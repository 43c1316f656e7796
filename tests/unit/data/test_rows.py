"""A row is read as what it is, or named as bad: never as the ``repr`` of what it holds."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from data_rows import row, run_config, write

from ptl_rl.config import FieldMap, SourceConfig
from ptl_rl.data.corpora import load_corpus
from ptl_rl.data.records import DataError, RowError
from ptl_rl.driver.data_report import data_report
from ptl_rl.evaluation.task_data import question_document

DEEP = '{"question": ' + "[" * 3000 + "]" * 3000 + ', "solution": "s", "answer": "1"}'
LONG = '{"question": "q", "solution": "s", "answer": ' + "1" * 5000 + "}"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row(1, answer=["1", "2"]), "column 'answer' (answer) holds a list, not text or a number"),
        (row(1, answer={"value": 1}), "holds a mapping, not text or a number"),
        (row(1, answer=True), "holds true or false, not text"),
        (row(1, answer=None), "holds null, not text"),
        (row(1, answer=float("nan")), "holds nan, not text"),
        (row(1, answer=float("-inf")), "holds -inf, not text"),
        ('{"question": "q", "solution": "s", "answer": 1e999}', "holds inf, not text"),
        (row(1, solution=["first", "second"]), "column 'solution' (solution) holds a list"),
        (row(1, question={"en": "What?"}), "column 'question' (question) holds a mapping"),
        (row(1, question=["What?"]), "is a list of 1 (str); of chats only those"),
        ('{"question": "q", "solution": "s", "answer": "1", "answer": "2"}', "'answer' stands in one object twice"),
        (DEEP, "not valid JSON: maximum recursion depth"),
        (LONG, "not valid JSON: Exceeds the limit (4300 digits)"),
    ],
)
def test_what_is_no_text_is_a_bad_row_with_its_line(bad, says, tmp_path):
    source = write(tmp_path / "a.jsonl", [row(0), bad])
    corpus = load_corpus(source, 0, max_bad_fraction=0.5)
    assert [record.answer for record in corpus] == ["0"]
    (example,) = corpus.dropped["bad"].examples
    assert example.startswith(f"{tmp_path}/a.jsonl:2: ") and says in example


def test_numbers_are_text(tmp_path):
    rows = [row(0, answer=7), row(1, answer=0.5), row(2, answer=-1), row(3, answer=10**4000)]
    answers = {record.id: record.answer for record in load_corpus(write(tmp_path / "a.jsonl", rows), 0)}
    assert answers == {"r0": "7", "r1": "0.5", "r2": "-1", "r3": "1" + "0" * 4000}


def test_an_id_that_is_none_is_made_of_the_content(tmp_path):
    source = write(tmp_path / "a.jsonl", [row(0, id={"split": "x"}), row(1, id=[]), row(2, id=7)])
    ids = [record.id for record in load_corpus(source, 0)]
    assert "7" in ids and all(len(i) == 16 for i in ids if i != "7")


@pytest.mark.parametrize("answer", [["1"], True, float("nan"), {"a": 1}])
def test_evaluation_reads_them_alike(answer):
    with pytest.raises(RowError, match=r"column 'answer' holds .*, not text or a number"):
        question_document({"question": "q", "answer": answer})


def verl(i: int, **changes) -> dict:
    """As verl's examples/data_preprocess/gsm8k.py writes them."""
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"content": f'What is {i}? Output the final answer after "####".', "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": f"{i}", "style": "rule"},
        "extra_info": {"answer": f"It is <<{i}={i}>>{i}.\n#### {i}", "index": i, "question": "q", "split": "train"},
        **changes,
    }


def parquet(path, rows) -> SourceConfig:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return SourceConfig(path=str(path))


@pytest.mark.parametrize("layout", [None, "verl"])
@pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
def test_verls_own_rows(kind, layout, tmp_path):
    path = tmp_path / f"train{kind}"
    rows = [verl(i) for i in range(3)]
    source = (parquet if kind == ".parquet" else write)(path, rows).model_copy(update={"layout": layout})
    first = next(r for r in load_corpus(source, 0) if r.answer == "2")
    assert (first.question, first.solution) == ('What is 2? Output the final answer after "####".', "It is 2.")
    assert load_corpus(write(path.with_suffix(".jsonl"), [verl(4, extra_info={"index": 4})]), 0)[0].solution == "4"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "What?"}]},
            "column 'prompt' (question) is a list of 2 (system, user); of chats only those are read",
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "is a list of 1 (user)"),
        ({"prompt": []}, "is a list of 0 ()"),
        ({"reward_model": {"style": "model"}}, "no column 'ground_truth' for the answer, in reward_model"),
        ({"reward_model": {"ground_truth": ["1", "2"]}}, "holds a list, not text"),
        ({"reward_model": "rule"}, "column 'reward_model' is no mapping with the ground_truth"),
    ],
)
def test_rows_of_verls_that_cannot_be_read_whole_are_bad(changes, says, tmp_path):
    with pytest.raises(DataError) as error:
        load_corpus(write(tmp_path / "a.jsonl", [verl(0, **changes)]), 0)
    assert says in str(error.value)


def test_a_column_of_chats_is_a_question_under_any_name(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"chat": [{"role": "user", "content": " What? "}], "answer": 5}])
    source = source.model_copy(update={"fields": FieldMap(question="chat", solution="answer")})
    assert load_corpus(source, 0)[0].question == "What?"


def test_answers_that_read_as_a_number_and_as_a_pair_are_named(tmp_path):
    golds = ["100,200", "1,005,000", "-3,141", "100", "1,2", "0,5", "0,500", "(100,200)", "12,34", "1000,200"]
    rows = [row(i, answer=gold) for i, gold in enumerate(golds)]
    test = [row(99, question="Another one?", answer="7")]
    notes = data_report(run_config(tmp_path, rows, test), samples=0)["notes"]
    (note,) = [note for note in notes if "one number and as several" in note]
    assert note.startswith("data.train: 3 answers read as one number and as several, as '")
    answer = note.split("'")[1]
    line = golds.index(answer) + 1
    assert f"({tmp_path}/train.jsonl:{line})" in note and f"write {answer.replace(',', '')}, or (" in note


def test_json_lines_keep_their_numbers_and_names(tmp_path):
    """Reading a name once must not change what is read."""
    content = {"question": "q", "solution": "s", "answer": "1", "extra": [{"a": 1}, {"a": 2}], "id": "x"}
    (record,) = load_corpus(write(tmp_path / "a.jsonl", [json.dumps(content)]), 0)
    assert (record.id, record.answer) == ("x", "1")
