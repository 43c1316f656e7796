"""Every known corpus, on made-up rows in its true schema, read by its name alone."""

import json

import datasets
import pytest
from data_rows import row, write

from ptl_rl.config import FieldMap, SourceConfig
from ptl_rl.data.corpora import DataError, load_corpus
from ptl_rl.data.known import KNOWN

ROWS = {
    "AI-MO/NuminaMath-CoT": (
        {
            "source": "synthetic_math",
            "problem": "What is 2 + 3?",
            "solution": "First \\boxed{4}, no: \\boxed{\\frac{10}{2}}.",
            "messages": [{"role": "user", "content": "What is 2 + 3?"}],
        },
        ("What is 2 + 3?", "First \\boxed{4}, no: \\boxed{\\frac{10}{2}}.", "\\frac{10}{2}"),
    ),
    "meta-math/MetaMathQA": (
        {
            "type": "GSM_Rephrased",
            "query": "How many are 2 and 3?",
            "original_question": "What is 2 + 3?",
            "response": "2 + 3 = 5\n#### 5\nThe answer is: 5",
        },
        ("How many are 2 and 3?", "2 + 3 = 5\n#### 5\nThe answer is: 5", "5"),
    ),
    "hiyouga/math12k": (
        {"problem": "What is 2 + 3?", "answer": "5"},
        ("What is 2 + 3?", "5", "5"),
    ),
    "openai/gsm8k": (
        {"question": "What are 2 and 1,003?", "answer": "It is 2 + 1003 = <<2+1003=1005>>1005.\n#### 1,005"},
        ("What are 2 and 1,003?", "It is 2 + 1003 = 1005.", "1,005"),
    ),
    "HuggingFaceH4/MATH-500": (
        {
            "problem": "What is 2 + 3?",
            "solution": "\\boxed{5}",
            "answer": "5",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "test/algebra/1.json",
        },
        ("What is 2 + 3?", "\\boxed{5}", "5"),
    ),
    "OpenCoder-LLM/opc-sft-stage2": (
        {
            "seq_id": 7,
            "instruction": "Add two numbers.",
            "output": "```python\ndef add(a, b): return a + b\n```",
            "code": "def add(a, b): return a + b",
            "entry_point": "add",
            "testcase": ["assert add(2, 3) == 5"],
        },
        ("Add two numbers.", "def add(a, b): return a + b", ""),
    ),
    "google-research-datasets/mbpp": (
        {
            "task_id": 7,
            "text": "Add two numbers.",
            "code": "def add(a, b):\r\n    return a + b",
            "test_list": ["assert add(2, 3) == 5"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        (
            "Add two numbers.\n\nThe program has to pass these tests:\n```\nassert add(2, 3) == 5\n```\n"
            "Answer with the whole program in one block that starts with ```python and ends with ```.",
            "```python\ndef add(a, b):\n    return a + b\n```",
            '{"tests": ["assert add(2, 3) == 5"], "setup": "", "entry": ["add"]}',
        ),
    ),
    "bigcode/starcoderdata": (
        {
            "max_stars_repo_path": "a.py",
            "max_stars_repo_name": "a/b",
            "max_stars_count": 3,
            "id": "17",
            "content": "x=1",
        },
        ("", "x=1", ""),
    ),
    "verl": (
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": "What is 2 + 3?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "5"},
            "extra_info": {"split": "train", "index": 0, "answer": "2 + 3 = <<2+3=5>>5\n#### 5", "question": "What?"},
        },
        ("What is 2 + 3?", "2 + 3 = 5", "5"),
    ),
}
CALLS = {
    "openai/gsm8k": {"name": "main"},
    "HuggingFaceH4/MATH-500": {"split": "test"},
    "OpenCoder-LLM/opc-sft-stage2": {"name": "educational_instruct"},
    "google-research-datasets/mbpp": {"name": "full"},
    "bigcode/starcoderdata": {"data_dir": "python"},
}


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves :data:`ROWS` and remembers how it was asked."""
    calls = []

    def load_dataset(path, name=None, *, data_dir=None, split=None):
        calls.append({"path": path, "name": name, "data_dir": data_dir, "split": split})
        if path not in ROWS:
            raise ConnectionError("no such\nhost")
        return datasets.Dataset.from_list([ROWS[path][0]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_every_known_corpus_is_tested():
    assert set(ROWS) == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_from_the_hub_by_name(name, hub):
    (record,) = load_corpus(SourceConfig(path=f"hub:{name}"), seed=0)
    assert (record.question, record.solution, record.answer) == ROWS[name][1]
    assert record.source == name
    assert hub == [{"path": name, "name": None, "data_dir": None, "split": "train", **CALLS.get(name, {})}]


def test_what_the_recipe_says_comes_first(hub):
    fields = FieldMap(question="answer", solution="question", answer=None)
    source = SourceConfig(path="hub:openai/gsm8k", config="socratic", split="test", fields=fields)
    (record,) = load_corpus(source, seed=0)
    assert record.solution == "What are 2 and 1,003?" and record.answer == ""
    assert hub[0] == {"path": "openai/gsm8k", "name": "socratic", "data_dir": None, "split": "test"}


def test_a_local_copy_is_read_by_its_layout(tmp_path):
    rows, parts = ROWS["meta-math/MetaMathQA"]
    source = write(tmp_path / "a.jsonl", [rows]).model_copy(update={"layout": "meta-math/MetaMathQA"})
    (record,) = load_corpus(source, seed=0)
    assert (record.question, record.solution, record.answer) == parts


def test_an_unreachable_hub_says_what_to_do(hub):
    with pytest.raises(
        DataError, match=r"'no/data' \(split 'train'\) cannot be loaded: no such host\. Offline\? Set path"
    ):
        load_corpus(SourceConfig(path="hub:no/data"), seed=0)


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        ("AI-MO/NuminaMath-CoT", {"problem": "Prove it.", "solution": "It is so, \\boxed{5"}),
        ("meta-math/MetaMathQA", {"query": "What?", "response": "It stops"}),
        ("openai/gsm8k", {"question": "What?", "answer": "It stops"}),
    ],
)
def test_solutions_without_an_answer_stay_unless_answers_are_needed(layout, rows, tmp_path):
    source = write(tmp_path / "a.jsonl", [rows, ROWS[layout][0]]).model_copy(update={"layout": layout})
    assert sorted(bool(record.answer) for record in load_corpus(source, seed=0)) == [False, True]
    corpus = load_corpus(source, seed=0, answers=True)
    assert len(corpus) == 1 and corpus[0].answer
    assert corpus.dropped["unanswered"].examples == (f"{tmp_path}/a.jsonl:1: no answer",)


def test_data_without_answers_cannot_be_prompts(tmp_path):
    rows = [{"question": "What?", "solution": "That."}]
    source = write(tmp_path / "a.jsonl", rows).model_copy(update={"fields": FieldMap(answer=None)})
    assert load_corpus(source, seed=0)[0].answer == ""
    with pytest.raises(DataError, match=r"a\.jsonl: no row has an answer"):
        load_corpus(source, seed=0, answers=True)


def test_opencoder_configurations_without_code(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"instruction": "Add.", "output": "a + b"}, {"instruction": "x", "code": ""}])
    source = source.model_copy(update={"layout": "OpenCoder-LLM/opc-sft-stage2"})
    corpus = load_corpus(source, seed=0, max_bad_fraction=1)
    assert [record.solution for record in corpus] == ["a + b"]
    assert "no column 'output' for the solution" in corpus.dropped["bad"].examples[0]


def test_plain_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": " Once. ", **row(1)}) + "\n")
    (record,) = load_corpus(SourceConfig(path=str(tmp_path / "a.jsonl"), fields=FieldMap(text="text")), seed=0)
    assert (record.question, record.solution, record.answer) == ("", "Once.", "")
