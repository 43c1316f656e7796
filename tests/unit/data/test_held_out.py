"""A recipe that names no evaluation sets is judged on rows of its own data, which nobody trains on."""

import json
import random

import numpy
import pytest
from data_rows import evaluation_data, row, run_config, worked_solutions, write

from ptl_rl.config import ConfigError, FieldMap, SourceConfig
from ptl_rl.config.recipe import parse_config, read_saved_config, save_config
from ptl_rl.data.held_out import rank
from ptl_rl.data.partition import subset_hash
from ptl_rl.data.prepare import run_data, training_data
from ptl_rl.data.records import DataError
from ptl_rl.driver.data_report import data_report

CPT = [{"method": "cpt"}]


def own(data: dict, **values):
    """A run that names no data but ``data``."""
    data = json.loads(json.dumps(data, default=lambda source: source.model_dump()))
    return parse_config({"data": data, "schedule": {"channels_per_cycle": [64, 64], "alignment": 32}, **values})


def ids(corpus) -> set[str]:
    return {record.id for record in corpus}


@pytest.fixture
def file(tmp_path) -> SourceConfig:
    return write(tmp_path / "my.jsonl", [row(i) for i in range(400)])


def test_train_validation_and_test_come_from_the_file_alone(file):
    data = run_data(own({"train": file}), 2)
    assert {name: len(corpus) for name, corpus in data.sets.items()} == {"train": 320, "validation": 20, "test": 60}
    parts = [ids(corpus) for corpus in data.sets.values()]
    assert set.union(*parts) == {f"r{i}" for i in range(400)} and sum(map(len, parts)) == 400
    (note,) = data.notes()
    assert note.startswith("data.test and data.validation are not set: 60 and 20 of 400 questions of data.train")
    assert str(file.path) in note and "name problems of your own as data.test" in note
    (use,) = data.sets["train"].sources
    assert use.dropped["held_out"].count == 80 and use.read == use.kept + 80


def test_every_run_and_stage_has_the_same_sets(file, tmp_path):
    config = own({"train": file})
    first = run_data(config, 2)
    for seed in (1, 7):
        other = own({"train": file}, seed=seed)
        for name in ("test", "validation"):
            assert list(evaluation_data(other, name)) == list(first.sets[name])
        assert ids(training_data(other)) == ids(first.sets["train"])
        assert list(training_data(other)) != list(first.sets["train"])
    save_config(config, tmp_path / "config.json")
    resumed = read_saved_config(tmp_path / "config.json")
    assert list(evaluation_data(resumed, "test")) == list(first.sets["test"])
    assert subset_hash(training_data(resumed)) == subset_hash(first.sets["train"])


def test_the_choice_is_the_questions_own(file, tmp_path):
    """Rows may be moved or added, and most problems stay what they were."""
    before = ids(evaluation_data(own({"train": file}), "test"))
    rows = [row(i) for i in range(400)]
    random.Random(3).shuffle(rows)
    moved = write(tmp_path / "moved.jsonl", rows)
    assert ids(evaluation_data(own({"train": moved}), "test")) == before
    more = write(tmp_path / "more.jsonl", [row(i) for i in range(420)])
    assert len(before & ids(evaluation_data(own({"train": more}), "test"))) > 50
    assert len(numpy.unique(rank(numpy.arange(1000, dtype=numpy.uint64)) >> numpy.uint64(48))) > 900


def test_no_question_that_is_held_out_stays_in_train(tmp_path):
    rows = [row(i) for i in range(400)] + [
        row(1000 + i, question=f" Q{i}? ", solution="Otherwise.") for i in range(400)
    ]
    for options in ({}, {"deduplicate": "exact"}, {"deduplicate": "off", "decontaminate": "off"}):
        config = own({"train": write(tmp_path / "twice.jsonl", rows), **options})
        data = run_data(config, 2)
        assert len(data.sets["test"]) == 60 and len(data.sets["validation"]) == 20
        keys = [corpus.question_keys() for corpus in data.sets.values()]
        assert not any(numpy.isin(keys[a], keys[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))
        assert data.sets["train"].dropped["held_out"].count == 160
        assert len(data.sets["train"]) == (320 if not options else 640)


def test_rows_that_hold_a_question_go_as_for_named_sets(tmp_path):
    rows = [row(i, question=" ".join(f"word{place}of{i}" for place in range(15))) for i in range(400)]
    held = evaluation_data(own({"train": write(tmp_path / "long.jsonl", rows)}), "test")[0]
    rows.append(row(400, id="copy", question="Another one?", solution=f"Somebody asked: {held.question}"))
    source = write(tmp_path / "copied.jsonl", rows)
    train = training_data(own({"train": source}))
    assert "copy" not in ids(train) and train.dropped["contaminated"].count == 1
    assert train.dropped["contaminated"].examples[0].endswith(f":401: holds 100% of data.test {held.id}")
    assert "copy" in ids(training_data(own({"train": source, "decontaminate": "off"})))


def test_one_set_may_be_named(file, tmp_path):
    both = run_data(own({"train": file}), 2).sets
    named = write(tmp_path / "named.jsonl", [row(10_000 + i) for i in range(30)])
    data = run_data(own({"train": file, "test": named}), 2)
    assert ids(data.sets["test"]) == ids(named_rows := evaluation_data(own({"train": file, "test": named}), "test"))
    assert len(named_rows) == 30 and ids(data.sets["validation"]) == ids(both["validation"])
    assert len(data.sets["train"]) == 380
    assert data.notes()[0].startswith("data.validation is not set: 20 of 400 questions")
    data = run_data(own({"train": file, "validation": named}), 2)
    assert ids(data.sets["test"]) == ids(both["test"]) and len(data.sets["train"]) == 340
    within = write(tmp_path / "within.jsonl", [row(i) for i in range(100)])
    data = run_data(own({"train": file, "test": within}), 2)
    assert not ids(data.sets["validation"]) & ids(data.sets["test"]) and len(data.sets["validation"]) == 15


def test_rows_limit_what_is_used(file):
    for rows, counts in ((400, (320, 60, 20)), (350, (331, 52, 17)), (200, (200, 30, 10))):
        sets = run_data(own({"train": file.model_copy(update={"rows": rows})}), 2).sets
        assert (len(sets["train"]), len(sets["test"]), len(sets["validation"])) == counts
    with pytest.raises(DataError, match="rows is 401, but there are only 400"):
        run_data(own({"train": file.model_copy(update={"rows": 401})}), 2)


def test_sizes_have_a_limit_and_a_setting(tmp_path):
    many = write(tmp_path / "many.jsonl", [row(i) for i in range(5000)])
    sets = run_data(own({"train": many}), 2).sets
    assert (len(sets["train"]), len(sets["test"]), len(sets["validation"])) == (5000 - 628, 500, 128)
    sets = run_data(own({"train": many, "held_out": 0.02}), 2).sets
    assert (len(sets["test"]), len(sets["validation"])) == (75, 25)


def test_merged_sources_give_by_their_size(file, tmp_path):
    second = write(tmp_path / "second.jsonl", [row(i) for i in range(300, 1500)])
    made = SourceConfig(path="testbed:rl", rows=50)
    data = run_data(own({"train": [file, second, made]}), 2)
    assert len(data.sets["test"]) == 225 and [use.used for use in data.sets["test"].sources] == [60, 165]
    assert not ids(data.sets["test"]) & ids(data.sets["train"])
    assert {record.source for record in data.sets["test"][:40]} == {"my", "second"}
    assert data.sets["train"].sources[2].used == 50


def test_a_corpus_holds_none_of_the_questions(file, tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", [row(i, solution=f"Other {i}") for i in range(500)])
    rl = run_data(own({"train": file, "corpus": corpus}), 2)
    assert len(rl.sets["corpus"]) == 420 and len(rl.sets["train"]) == 320
    assert "data.train" in rl.notes()[0]
    texts = write(tmp_path / "texts.jsonl", [{"t": f"q{i}?"} for i in range(400)])
    texts = texts.model_copy(update={"fields": FieldMap(text="t")})
    assert len(worked_solutions(own({"train": file, "corpus": texts}))) == 320
    cpt = run_data(own({"corpus": [corpus, texts]}, recovery=CPT), 2)
    assert list(cpt.sets) == ["corpus", "validation", "test"]
    assert (len(cpt.sets["test"]), len(cpt.sets["validation"])) == (75, 25) and "data.corpus" in cpt.notes()[0]
    assert ids(cpt.sets["test"]) <= {f"r{i}" for i in range(500)}


def test_different_recoveries_on_the_same_data_are_judged_on_the_same_problems(file, tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", [row(i, question=f"w{i}?") for i in range(500)])
    text = corpus.model_copy(update={"fields": FieldMap(text="solution")})
    for solutions in (corpus, text):
        data = {"train": file, "corpus": solutions}
        rl, cpt = run_data(own(data), 2), run_data(own(data, recovery=CPT), 2)
        for name in ("validation", "test"):
            assert list(rl.sets[name]) == list(cpt.sets[name]) and len(cpt.sets[name]) > 10
        assert list(cpt.sets) == ["corpus", "validation", "test"] and "data.train" in cpt.notes()[0]
        assert not ids(cpt.sets["test"]) & ids(rl.sets["train"])


def test_what_cannot_be_judged_is_refused(file, tmp_path):
    few = write(tmp_path / "few.jsonl", [row(i) for i in range(100)])
    message = (
        r"data\.test and data\.validation are not set, and of the 100 questions .* gives 15 to test, which needs 20; "
    )
    with pytest.raises(DataError, match=message + r"set data\.test and data\.validation"):
        run_data(own({"train": few}), 2)
    text = file.model_copy(update={"fields": FieldMap(text="solution")})
    unanswered = file.model_copy(update={"fields": FieldMap(answer=None)})
    for source in (text, unanswered, [text, unanswered]):
        with pytest.raises(
            ConfigError, match=r"not set, and data\.train has no answers .*; set data\.test and data\.val"
        ):
            own({"train": source}, recovery=CPT)
        with pytest.raises(ConfigError, match=r"data\.corpus has no answers"):
            own({"corpus": source}, recovery=CPT)
    named = {"test": file, "validation": file}
    assert len(run_data(own({"train": text, **named, "decontaminate": "off"}, recovery=CPT), 2).sets["train"]) == 400
    with pytest.raises(DataError, match=r"^data\.train: .*nowhere\.jsonl: no such file"):
        run_data(own({"train": {"path": "nowhere.jsonl"}}), 2)
    with pytest.raises(DataError, match=r"^data\.test: .*nowhere\.jsonl: no such file"):
        run_data(own({"train": file, "test": {"path": "nowhere.jsonl"}}), 2)


def test_the_test_bed_is_judged_by_its_own_problems():
    made = run_data(own({"train": {"path": "testbed:rl", "rows": 100}}), 2)
    assert [use.path for use in made.sets["test"].sources] == ["testbed:test"]
    assert len(made.sets["test"]) == 500 and len(made.sets["validation"]) == 128
    (note,) = made.notes()
    assert "data.validation: 128 of testbed:validation and data.test: 500 of testbed:test" in note
    programs = own({"train": [{"path": "testbed:programs-rl", "rows": 9}]})
    assert programs.evaluation_set("test").path == "testbed:programs-test"
    assert programs.evaluation_set("validation").rows == 128
    hard = own({"train": {"path": "testbed:rl:4,5"}})
    assert hard.evaluation_set("validation").path == "testbed:validation:4,5"
    assert len(run_data(own({}), 2).sets["train"]) == 4096  # a shipped model with nothing named


def test_another_model_needs_data_of_its_own(file):
    with pytest.raises(DataError, match=r"data\.train: not set, and some/model is none of the test bed's models"):
        run_data(own({}, model={"path": "some/model"}), 2)
    with pytest.raises(DataError, match=r"data\.train: not set"):
        run_data(own({"corpus": file}, model={"path": "some/model"}), 2)
    assert next(iter(run_data(own({"corpus": file}, model={"path": "x/y"}, recovery=CPT), 2).sets)) == "corpus"


def test_ptl_data_tells_of_it(file, tmp_path):
    found = data_report(own({"train": file}, recovery=CPT), samples=1)
    assert found["sets"]["train"]["sources"][0]["held_out"] == 80 and found["sets"]["test"]["rows"] == 60
    held, calibration, suffix, *_ = found["notes"]
    assert "60 and 20 of 400 questions" in held and calibration.startswith("calibration.sequences is 512, but")
    assert suffix.startswith("data.prompt_suffix is not set: every question is followed by 'Please reason")
    named = run_config(tmp_path, prompt_suffix="")
    assert not any("not set" in note for note in data_report(named)["notes"])
