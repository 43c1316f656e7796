"""What a run reads: sources merged, repeats and copies of evaluation questions out, every row accounted for."""

import random

import pytest
from data_rows import evaluation_data, row, run_config, worked_solutions, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptl_rl.config import FieldMap, SourceConfig
from ptl_rl.config.recipe import load_config, parse_config
from ptl_rl.data.partition import partition, subset_hash
from ptl_rl.data.prepare import run_data, training_data
from ptl_rl.data.records import DataError

LONG = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many in all?"


def ids(corpus) -> list[str]:
    return [record.id for record in corpus]


def accounted(corpus) -> bool:
    """Nothing that was read is lost on the way."""
    for use in corpus.sources:
        if use.read != use.kept + sum(dropped.count for dropped in use.dropped.values()):
            return False
    return len(corpus) == sum(use.used for use in corpus.sources)


def test_one_source_is_read_as_it_always_was(tmp_path):
    config = run_config(tmp_path, [row(i) for i in range(50)])
    order = [f"r{i}" for i in range(50)]
    random.Random(config.seed).shuffle(order)
    assert ids(training_data(config)) == ids(worked_solutions(config)) == order
    one = config.data.train.model_dump()
    listed = config.model_copy(update={"data": config.data.model_copy(update={"train": [SourceConfig(**one)]})})
    assert ids(training_data(listed)) == order


def test_the_demo_is_untouched(repository):
    config = load_config(repository / "recipes/demo_restart_cpu.yaml")
    data = run_data(config, 4)
    assert data.notes() == []
    assert [len(corpus) for corpus in data.sets.values()] == [8192, 200, 500]
    assert [len(part) for part in data.subsets["train"]] == [2048] * 4


def test_generated_problems_share_runs_of_words_and_are_compared_whole(tmp_path):
    """By runs of words a fifth of the training problems would go, though no question stands on both sides."""
    made = {name: SourceConfig(path=f"testbed:{name}", rows=500) for name in ("rl", "test", "validation")}
    config = run_config(tmp_path, made["rl"], made["test"], made["validation"])
    assert len(training_data(config)) == 500
    written = write(tmp_path / "written.jsonl", [vars(record) for record in training_data(config)])
    tests = write(tmp_path / "tests.jsonl", [vars(record) for record in evaluation_data(config, "test")])
    both_files = run_config(tmp_path, written, tests, made["validation"])
    assert len(training_data(both_files)) < 480
    copied = run_config(tmp_path, written, made["test"], made["validation"])
    assert len(training_data(copied)) == 500
    same = run_config(tmp_path, made["test"], made["test"], made["validation"])
    assert len(training_data(same)) == 0


def test_merged_sources(tmp_path):
    first = write(tmp_path / "a.jsonl", [row(i) for i in range(30)]).model_copy(update={"rows": 10})
    second = write(tmp_path / "b.jsonl", [row(i) for i in range(20, 60)])
    texts = write(tmp_path / "c.jsonl", [{"t": f"Text {i}"} for i in range(5)])
    texts = texts.model_copy(update={"fields": FieldMap(text="t")})
    config = run_config(tmp_path, corpus=[first, second, texts])
    corpus = worked_solutions(config)
    assert accounted(corpus) and [use.used for use in corpus.sources] == [10, corpus.sources[1].kept, 5]
    assert {record.source for record in corpus} == {"a", "b", "c"}
    assert len({record.source for record in corpus[:15]}) > 1  # mixed
    assert len(set(ids(corpus))) == len(corpus)
    # Rows of the first source that are not used take nothing from the second.
    assert {int(i[1:]) for i in ids(corpus) if i.startswith("r")} >= set(range(20, 60))
    again = worked_solutions(config)
    assert list(again) == list(corpus)


def test_repeats(tmp_path):
    rows = [row(0), row(1), row(2, question="Q0 ?", solution="x"), row(3, question=" q1? "), row(4, question="q1 ?")]
    rows += [row(5, question="Q1?", solution="S1")]
    config = run_config(tmp_path, rows)
    corpus = training_data(config)
    assert sorted(ids(corpus)) == ["r0", "r1", "r2", "r4"] and accounted(corpus)
    path = tmp_path / "train.jsonl"
    assert corpus.dropped["duplicate"].examples == (f"{path}:4: repeats {path}:2", f"{path}:6: repeats {path}:2")
    exact = training_data(run_config(tmp_path, rows, deduplicate="exact"))
    assert sorted(ids(exact)) == ["r0", "r1", "r2", "r3", "r4"] and exact.dropped["duplicate"].count == 1
    parts = partition(exact, 3)  # a question that stands twice stays in one subset
    assert sorted(map(len, parts)) == [1, 2, 2]
    assert len(training_data(run_config(tmp_path, rows, deduplicate=False))) == 6


def test_copies_of_evaluation_questions(tmp_path):
    tests = [row(100, question=LONG), row(101, question="What is 2 + 3?")]
    held_out = [
        row(200, question="Something for the validation set, which is long enough for a run of thirteen words.")
    ]
    rows = [row(i) for i in range(10)]
    rows[3] = row(3, solution=f"As in: {LONG.upper()} It is 72.")
    rows[5] = row(5, question="what is $2 + 3$")
    rows[7] = row(7, question="What is 2 - 3?")
    rows[8] = row(8, question=held_out[0]["question"])
    config = run_config(tmp_path, rows, tests, held_out)
    corpus = training_data(config)
    assert sorted(ids(corpus)) == ["r0", "r1", "r2", "r4", "r6", "r7", "r9"] and accounted(corpus)
    dropped = corpus.dropped["contaminated"]
    path = tmp_path / "train.jsonl"
    assert dropped.count == 3 and dropped.examples == (
        f"{path}:4: holds 100% of data.test r100",
        f"{path}:6: holds 100% of data.test r101",
        f"{path}:9: holds 100% of data.validation r200",
    )
    (note,) = run_data(config, 2).notes()
    assert note.startswith(f"data.train: dropped 3 rows that hold an evaluation question: {path}:4: holds")
    left_in = run_config(tmp_path, rows, tests, held_out, decontaminate=False)
    assert len(training_data(left_in)) == 10
    assert run_data(left_in, 2).notes() == []  # none of them is word for word a question of the test set
    rows[0] = row(0, question=LONG)
    left_in = run_config(tmp_path, rows, tests, held_out, decontaminate=False)
    assert run_data(left_in, 2).notes() == ["data.test: 1 of its questions also stand in data.train"]


def test_a_change_of_the_evaluation_set_counts(tmp_path):
    rows = [row(i) for i in range(9)] + [row(9, question=LONG)]
    assert len(training_data(run_config(tmp_path, rows))) == 10
    assert len(training_data(run_config(tmp_path, rows, test=[row(0, question=LONG.lower())]))) == 9
    assert len(training_data(run_config(tmp_path, rows))) == 10
    part = " ".join(LONG.split()[:16]) + " whatever it was that she did with the rest of all of those clips of hers?"
    config = run_config(tmp_path, rows, test=[row(0, question=part)])
    assert len(training_data(config)) == 9
    config = run_config(tmp_path, rows, test=[row(0, question=part)], decontaminate={"min_overlap": 0.9})
    assert len(training_data(config)) == 10


def test_evaluation_rows_held_out_of_the_training_file(tmp_path):
    source = write(tmp_path / "all.jsonl", [row(i) for i in range(40)])
    few = source.model_copy(update={"rows": 8})
    config = run_config(tmp_path, source, few, few)
    assert len(training_data(config)) == 32
    assert not set(ids(training_data(config))) & set(ids(evaluation_data(config, "test")))


def test_which_sets_are_read(tmp_path):
    solutions = write(tmp_path / "s.jsonl", [{"question": f"w{i}", "solution": f"v{i}"} for i in range(30)])
    solutions = solutions.model_copy(update={"fields": FieldMap(answer=None)})
    config = run_config(tmp_path, corpus=solutions)
    data = run_data(config, 2)
    assert list(data.sets) == ["train", "corpus", "validation", "test"] and list(data.subsets) == ["train", "corpus"]
    assert worked_solutions(config)[0].question.startswith("w") and training_data(config)[0].question.startswith("q")
    cpt = config.model_dump() | {"recovery": [{"method": "cpt"}]}
    cpt["data"]["train"]["path"] = "nowhere.jsonl"  # nobody reads it
    assert list(run_data(parse_config(cpt), 2).sets) == ["corpus", "validation", "test"]
    cpt["data"] |= {"train": solutions.model_dump(), "corpus": None}
    data = run_data(parse_config(cpt), 2)
    assert len(data.sets["train"]) == 30 and len(data.subsets["train"]) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train", r"^data\.train: .*train\.jsonl: no such file"),
        ("test", r"^data\.test: .*test\.jsonl: no such file"),
        ("validation", r"^data\.validation: .*validation\.jsonl: no such file"),
    ],
)
def test_errors_name_the_set(name, message, tmp_path):
    config = run_config(tmp_path)
    (tmp_path / f"{name}.jsonl").unlink()
    with pytest.raises(DataError, match=message):
        run_data(config, 2)


def test_too_few_questions_for_the_cycles(tmp_path):
    config = run_config(tmp_path, [row(0), row(1)])
    with pytest.raises(
        DataError, match=r"^data\.train: the training data has 2 distinct questions, but the run needs 3"
    ):
        run_data(config, 3)


QUESTIONS = [LONG, "What is 2 + 3?", "what is 2 + 3", *(f"q{i}" for i in range(6))]
ROWS = st.builds(
    lambda question, solution, kind: "nonsense" if kind == 0 else row(0, question=question, solution=solution),
    st.sampled_from(QUESTIONS),
    st.sampled_from(["s", "S ", "t", LONG]),
    st.integers(0, 9),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.lists(ROWS, min_size=1, max_size=12), min_size=1, max_size=3),
    deduplicate=st.sampled_from(["question", "exact", "off"]),
    decontaminate=st.booleans(),
)
def test_every_row_is_kept_or_dropped_for_a_reason(files, deduplicate, decontaminate, tmp_path):
    sources = [write(tmp_path / f"{place}.jsonl", rows) for place, rows in enumerate(files)]
    options = {"deduplicate": deduplicate, "decontaminate": decontaminate, "max_bad_fraction": 1}
    config = run_config(tmp_path, sources, [row(0, question=LONG), row(1, question="What is 2+3?")], **options)
    corpus = training_data(config)
    assert accounted(corpus)
    assert [use.read for use in corpus.sources] == [len(rows) for rows in files]
    questions = [" ".join(record.question.split()).casefold() for record in corpus]
    if deduplicate == "question":
        assert len(set(questions)) == len(questions)
    if decontaminate:
        assert not any(q.startswith(("natalia", "what is 2 + 3")) for q in questions)
        assert not any("Natalia" in record.solution for record in corpus)
    if len(set(questions)) > 1:
        parts = partition(corpus, 2)
        assert len(parts[0]) + len(parts[1]) == len(corpus)
        assert subset_hash(parts[0]) != subset_hash(parts[1])
