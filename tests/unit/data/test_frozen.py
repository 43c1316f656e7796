"""A run's rows are written into its folder once, and whatever becomes of their sources, these are read."""

import pickle
from pathlib import Path

import numpy
import pyarrow
import pytest
from data_rows import row, run_config, write

from ptl_rl.config import ConfigError, SourceConfig
from ptl_rl.data.frozen import FrozenData, freeze
from ptl_rl.data.partition import partition, subset_hash
from ptl_rl.data.prepare import run_data
from ptl_rl.data.records import DataError
from ptl_rl.driver.journal import Entry
from ptl_rl.driver.loop import start_run
from ptl_rl.driver.run_data import prepare_data
from ptl_rl.driver.run_folder import RunFolder


@pytest.fixture
def config(tmp_path):
    """Two sources of problems, worked solutions, both evaluation sets and general text."""
    second = write(tmp_path / "second.jsonl", [row(i) for i in range(20, 45)])
    first = write(tmp_path / "first.jsonl", [row(i) for i in range(20)])
    corpus = write(tmp_path / "corpus.jsonl", [row(i, question=f"w{i}?") for i in range(30)])
    made = run_config(tmp_path, train=[first, second, SourceConfig(path="testbed:rl", rows=9)], corpus=corpus)
    text = write(tmp_path / "text.jsonl", [{"text": f"General text {i}."} for i in range(12)])
    contrast = {"data": {"path": text.path, "fields": {"text": "text"}}, "weight": 0.5, "sequences": 7}
    values = made.model_dump(mode="json")
    return type(made).model_validate({**values, "criterion": {"channels": "activation", "contrast": contrast}})


def test_what_is_read_is_what_was_prepared(config, tmp_path):
    data, frozen = run_data(config, 2), freeze(config, 2, tmp_path / "run/data")
    for name, corpus in data.sets.items():
        read = frozen.read(name)
        assert list(read) == list(corpus) and len(read) == frozen.sets[name]["rows"] > 0
        assert numpy.array_equal(read.question_keys(), corpus.question_keys())
    assert {record.source for record in frozen.training()} == {"first", "second", "ptl_rl/word_problems"}
    assert list(frozen.training()) == list(data.sets["train"])
    assert list(frozen.worked_solutions()) == list(data.sets["corpus"])
    assert [len(list(frozen.evaluation(name))) for name in ("validation", "test")] == [1, 1]
    assert [record.solution[:12] for record in frozen.contrast()] == ["General text"] * 7
    for name in ("train", "corpus"):
        hashes = [subset_hash(part) for part in partition(frozen.read(name), 2)]
        assert hashes == frozen.sets[name]["subsets"] == [subset_hash(part) for part in data.subsets[name]]


def test_sources_that_change_or_go_change_nothing(config, tmp_path):
    frozen = freeze(config, 2, tmp_path / "data")
    before = {name: list(frozen.read(name)) for name in frozen.sets}
    for path in tmp_path.glob("*.jsonl"):
        path.write_text("nonsense\n")
    again = FrozenData(tmp_path / "data")
    again.check()
    assert {name: list(again.read(name)) for name in again.sets} == before


def test_what_an_earlier_version_wrote(config, tmp_path):
    """Its tables had no column of errors, and the same columns in another order."""
    frozen = freeze(config, 2, tmp_path / "data")
    before = {name: list(frozen.read(name)) for name in frozen.sets}
    names = ["question", "solution", "answer", "id", "number", "question_key", "content_key", "source"]
    for path in (tmp_path / "data").glob("*.arrow"):
        table = pyarrow.ipc.open_file(path.read_bytes()).read_all().select(names)
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    assert {name: list(FrozenData(tmp_path / "data").read(name)) for name in before} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_named_and_leaves_nothing(config, tmp_path, monkeypatch):
    real = pyarrow.OSFile
    monkeypatch.setattr(pyarrow, "OSFile", lambda path, mode: real("/dev/full", mode))
    with pytest.raises(DataError, match=r"data: cannot write the run's data: .*No space left .*; make room"):
        freeze(config, 2, tmp_path / "run" / "data")
    assert list((tmp_path / "run").iterdir()) == []


def test_without_a_corpus_of_its_own_or_general_text(tmp_path):
    frozen = freeze(run_config(tmp_path), 1, tmp_path / "data")
    assert frozen.name_of_solutions == "train" and list(frozen.worked_solutions()) == list(frozen.training())
    assert frozen.contrast() == []


def test_rows_are_mapped_and_hold_no_memory_of_their_own(config, tmp_path):
    frozen = freeze(config, 2, tmp_path / "data")
    before = pyarrow.total_allocated_bytes()
    kept = [frozen.read(name) for name in frozen.sets]
    assert pyarrow.total_allocated_bytes() - before < 4096 and len(kept) == 5
    assert len(pickle.dumps(FrozenData(tmp_path / "data"))) < 500  # what goes to workers


def test_changed_or_missing_files_are_named(config, tmp_path):
    freeze(config, 2, tmp_path / "data")
    file, facts = tmp_path / "data/train.arrow", tmp_path / "data/data.json"
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes(9))
    with pytest.raises(DataError, match=r"train\.arrow: the run's data was changed; put it back as it was"):
        FrozenData(tmp_path / "data").check()
    file.unlink()
    with pytest.raises(DataError, match=r"train\.arrow: the run's data is gone"):
        FrozenData(tmp_path / "data").check()
    with pytest.raises(DataError, match=r"train\.arrow: the run's data cannot be read"):
        FrozenData(tmp_path / "data").training()
    facts.write_text(facts.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(DataError, match=r"data\.json: written by another version of ptl-rl \(format 9\)"):
        FrozenData(tmp_path / "data").check()
    facts.write_text("{")
    with pytest.raises(DataError, match=r"data\.json: the run's data cannot be read"):
        FrozenData(tmp_path / "data").check()


def test_a_writer_that_was_killed_leaves_nothing_that_counts(config, tmp_path):
    folder = RunFolder(tmp_path / "run")
    unfinished = folder.data.with_name(".data.tmp")
    unfinished.mkdir(parents=True)
    (unfinished / "train.arrow").write_bytes(b"half")
    prepare_data(config, folder, [])
    assert FrozenData(folder.data).exists and not unfinished.exists()
    prepare_data(config, folder, [])  # it is there: nothing is read anew


def entries_of(hashes: dict[str, list[str]]) -> list[Entry]:
    score = {"stage": "score", "seconds": 1.0}
    return [
        Entry(cycle=0, stage="evaluate", metrics={"accuracy": 0.5}),
        *(Entry(cycle=i, metrics={"subset_hash": found}, **score) for i, found in enumerate(hashes["corpus"], 1)),
        Entry(cycle=1, stage="recover", metrics={"method": "grpo", "subset_hash": hashes["train"][0]}),
        Entry(cycle=1, stage="recover", part=1, metrics={"method": "cpt", "subset_hash": hashes["corpus"][0]}),
    ]


def test_a_run_of_an_earlier_version_goes_on_with_the_rows_that_it_began_with(config, tmp_path):
    """It has no data of its own, but its journal has the hashes of what its stages have read."""
    parts = run_data(config, 2).subsets
    entries = entries_of({name: [subset_hash(part) for part in parts[name]] for name in parts})
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    prepare_data(config, folder, entries)
    assert FrozenData(folder.data).sets["train"]["subsets"] == [subset_hash(part) for part in parts["train"]]


def test_problems_that_were_edited_before_a_resume_are_refused(config, tmp_path):
    """Cycle 0 of a run of an earlier version was judged on other problems than there are now."""
    import pyarrow
    import pyarrow.parquet

    folder = RunFolder(tmp_path / "run")
    (folder.path / "cycles/000/evaluation").mkdir(parents=True)
    (problem,) = run_data(config, 2).sets["test"]
    rows = [{"id": problem.id, "question": problem.question, "expected": problem.answer}]
    samples = folder.path / "cycles/000/evaluation/samples.parquet"
    entry = Entry(cycle=0, stage="evaluate", artefact="cycles/000/evaluation", metrics={"accuracy": 0.5})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**rows[0], "expected": "another"}]), samples)
    with pytest.raises(ConfigError, match=r"cycle 0 was judged on other problems than data\.test has now"):
        prepare_data(config, folder, [entry])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), samples)
    prepare_data(config, folder, [entry])
    assert FrozenData(folder.data).exists


def test_data_of_another_recipe_is_not_taken_for_the_runs(tmp_path):
    """A run that a cluster refused leaves its data; the next one in the same folder has another recipe."""
    first = run_config(tmp_path, train=[row(i) for i in range(30)])
    corpus = write(tmp_path / "own.jsonl", [row(i, question=f"w{i}") for i in range(9)])
    second = run_config(tmp_path, train=[row(i) for i in range(40)], corpus=corpus)
    folder = start_run(first, tmp_path / "run")
    prepare_data(first, folder, [])
    with pytest.raises(ConfigError, match=r"data\.corpus: not what .*data was written with"):
        prepare_data(second, folder, [])  # as of a config.json that was edited
    again = start_run(second, tmp_path / "run")
    prepare_data(second, again, [])
    assert len(FrozenData(again.data).training()) == 40 and len(FrozenData(again.data).worked_solutions()) == 9


def test_a_set_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="the run's data has no corpus"):
        freeze(run_config(tmp_path), 1, tmp_path / "data").read("corpus")


def test_a_file_that_was_edited_before_a_resume_is_refused(config, tmp_path):
    parts = run_data(config, 2).subsets
    entries = entries_of({name: [subset_hash(part) for part in parts[name]] for name in parts})
    edited = tmp_path / "second.jsonl"
    read = next(record for record in parts["train"][0] if record.source == "second")
    edited.write_text(edited.read_text().replace(f'"{read.solution}"', '"another solution"'))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with pytest.raises(ConfigError, match=r"cycle 1 read other rows of data\.train .*second\.jsonl.* was changed"):
        prepare_data(config, folder, entries)
    assert list(folder.path.iterdir()) == []  # it can be put back, and nothing is left of the attempt
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace('"s7"', '"another solution"'))
    with pytest.raises(ConfigError, match=r"cycle . read other rows of data\.corpus .*corpus\.jsonl was changed"):
        prepare_data(config, RunFolder(tmp_path / "other"), entries)
