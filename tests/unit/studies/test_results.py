"""What finished runs amount to; the runs here are journals and sample tables as the driver leaves them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import save_config
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.driver.state import fold, next_stage
from ptl_rl.studies import results, runner
from ptl_rl.studies.command import demo_recipes, prepare
from ptl_rl.studies.slicegpt_model import MADE_FROM, made_from

PROBLEMS = 40


@pytest.fixture
def made(tmp_path):
    return prepare("iterations", [], [], tmp_path / "study")[0]


def metrics(correct, parameters):
    return {
        "accuracy": sum(correct) / len(correct),
        "problems": len(correct),
        "parameters": parameters,
        "flops_per_token": 2 * parameters,
        "tokens_per_answer": 36.0,
    }


def finish(run, solved, model=None, parameters=400):
    """A whole run whose final model solves the problems ``solved``."""
    run.folder.mkdir(parents=True)
    config = run.row.config(run.seed, model)
    save_config(config, run.folder / "config.json")
    journal = Journal(run.folder / "journal.jsonl")
    entries = []
    while (stage := next_stage(fold(config, entries))) is not None:
        extra = {}
        if stage.name == "evaluate":
            right = [1.0] * 38 + [0.0] * 2 if stage.cycle == 0 else [float(i in solved) for i in range(PROBLEMS)]
            extra = metrics(right, 1000 if stage.cycle == 0 else parameters)
            folder = run.folder / f"evaluation-{stage.cycle}"
            folder.mkdir()
            rows = [{"id": f"p{i}", "correct": value} for i, value in enumerate(right)]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "samples.parquet")
        elif stage.name == "gate":
            extra = {"decision": "accept_below"}
        elif stage.name == "recover":
            extra = {"steps": config.recoveries(0)[0].steps_of(stage.cycle - 1)}
        entry = Entry(
            cycle=stage.cycle, stage=stage.name, artefact=f"evaluation-{stage.cycle}", seconds=1.0, metrics=extra
        )
        journal.append(entry)
        entries.append(entry)


def test_nothing_finished_gives_nothing(made):
    assert results.write(made.whole, made.out, made.shape, "command") is None


def test_a_line_per_row_with_seeds_put_together(made):
    for run in runner.runs_of(made.study, made.out, 2):
        if run.row.name == "cuts-1":
            finish(run, set(range(30 + run.seed)))
        elif run.row.name == "cuts-2":
            finish(run, set(range(20)))
        elif run.row.name == "cuts-4" and run.seed == 0:
            finish(run, set(range(30)))
    lines = {line.row.name: line for line in results.collect(made.whole, made.out)}
    assert set(lines) == {"cuts-1", "cuts-2", "cuts-4"}
    assert lines["cuts-1"].accuracies == [0.75, 31 / 40]
    assert lines["cuts-1"].mean == pytest.approx(30.5 / 40)
    assert lines["cuts-1"].low < lines["cuts-1"].mean < lines["cuts-1"].high
    assert lines["cuts-1"].seeds == [0, 1] and lines["cuts-4"].seeds == [0]
    against = lines["cuts-2"].against
    assert against.difference == pytest.approx(-10.5 / 40)
    assert against.p_value < 0.05 and (against.gained, against.lost) == (0, 11)
    # Two comparisons: the smaller p-value counts twice, the larger once, and on the seed that both have.
    other = lines["cuts-4"].against
    assert other.p_value == 1.0 and other.difference == 0
    assert lines["cuts-2"].adjusted_p == pytest.approx(2 * against.p_value)
    assert lines["cuts-4"].adjusted_p == 1.0 and lines["cuts-1"].adjusted_p is None
    assert lines["cuts-4"].steps == 120

    text = results.write(made.whole, made.out, made.shape, "ptl study iterations")
    assert "Of the 2 rows with 2 seeds, the highest mean is that of 1 cut with 76.2%" in text
    assert "Rows with fewer finished seeds: 4 cuts (1)." in text
    assert "2 cuts: worse than 1 cut" in text and "4 cuts: not told apart from 1 cut" in text
    assert "The original solves 95.0% of 40 test problems" in text
    share = 400 / made.shape.parameters
    assert f"| 2 cuts | 400 ({share:.0%}) |" in text
    assert "`ptl study iterations --seeds 2`" in text
    assert (made.out / "figure.png").stat().st_size > 5000
    found = json.loads((made.out / "results.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["cuts-1", "cuts-2", "cuts-4"]
    assert found["rows"][1]["against"]["lost"] == 11


def test_a_row_whose_seeds_end_at_sizes_of_their_own(made):
    for run in runner.runs_of(made.study, made.out, 2):
        if run.row.name == "cuts-1":
            finish(run, set(range(30)), parameters=400 + 200_000 * run.seed)
    text = results.write(made.whole, made.out, made.shape, "ptl study iterations")
    small, large = (f"{count:,} ({count / made.shape.parameters:.0%})" for count in (400, 200_400))
    assert f"| 1 cut | {small} to {large} |" in text


def test_finished_runs_are_not_made_again_and_a_failed_one_does_not_stop_the_others(made, monkeypatch):
    runs = runner.runs_of(made.study, made.out, 1)
    finish(runs[0], {1})
    begun = []

    def make(run, out):
        begun.append(run.name)
        return 1 if run.row.name == "cuts-2" else 0

    monkeypatch.setattr(runner, "_make", make)
    with pytest.raises(runner.StudyFailed, match=r"1 of 4 runs failed: cuts-2-seed0 \(exit status 1"):
        runner.make_runs(made.study, made.out, 1)
    assert begun == ["cuts-2-seed0", "cuts-4-seed0", "cuts-8-seed0"]


def test_another_study_or_design_is_not_mixed_in(made):
    runner.check_folder(made.whole, made.out, 1)
    runner.save_study(made.whole, made.out)
    finish(runner.runs_of(made.study, made.out, 1)[0], {1})
    runner.check_folder(made.whole, made.out, 1)
    other = prepare("iterations", [], ["data.test.rows=7"], made.out)[0]
    with pytest.raises(ConfigError, match="was made with another data; name another `out`"):
        runner.check_folder(other.whole, other.out, 1)
    other = prepare("step_size", [], [], made.out)[0]
    with pytest.raises(ConfigError, match="holds the study iterations"):
        runner.check_folder(other.whole, other.out, 1)


def test_fewer_rows_and_seeds_do_not_take_from_the_results(made):
    for run in runner.runs_of(made.whole, made.out, 2):
        finish(run, set(range(30)))
    some = prepare("iterations", [], [], made.out, only=["cuts-1"])[0]
    assert [row.name for row in some.study.rows] == ["cuts-1"]
    assert results.write(some.whole, some.out, some.shape, some.command).count("\n| ") == 5
    assert all(line.seeds == [0, 1] for line in results.collect(some.whole, some.out))


def test_runs_on_different_problems_are_not_averaged(made):
    for run in runner.runs_of(made.whole, made.out, 2):
        finish(run, {1})
        if run.seed:
            path = run.folder / "evaluation-1/samples.parquet"
            rows = [{"id": f"q{i}", "correct": 1.0} for i in range(3)]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(ConfigError, match="evaluated on different problems"):
        results.collect(made.whole, made.out)


def test_a_sliced_model_of_another_size_is_not_used_again(tmp_path):
    recipe = demo_recipes("table1")[1]
    made = prepare("table1", [recipe], [], tmp_path, only=["slicegpt"])[0]
    (run,) = runner.runs_of(made.study, tmp_path, 1)
    config = run.config(tmp_path)
    assert config.model.path == str(tmp_path / "models/slicegpt-seed0") and config.model.parent == "testbed:llama"
    note = {MADE_FROM: made_from(run.row.config(0), run.row.slicegpt_size)}
    run.model_folder(tmp_path).mkdir(parents=True)
    (run.model_folder(tmp_path) / "slicegpt.json").write_text(json.dumps(note))
    runner.check_folder(made.whole, tmp_path, 1)
    del note[MADE_FROM]["data"]["held_out"]  # of before there was such a setting
    (run.model_folder(tmp_path) / "slicegpt.json").write_text(json.dumps(note))
    runner.check_folder(made.whole, tmp_path, 1)
    other = prepare("table1", [recipe], ["schedule.channels_per_cycle=[64, 64]"], tmp_path)[0]
    with pytest.raises(ConfigError, match="was made of another model, size or calibration"):
        runner.check_folder(other.whole, tmp_path, 1)


def test_a_moved_folder_finds_its_own_models(tmp_path, monkeypatch):
    recipe = demo_recipes("table1")[1]
    made = prepare("table1", [recipe], [], tmp_path / "before", only=["slicegpt"])[0]
    (run,) = runner.runs_of(made.study, made.out, 1)
    run.folder.mkdir(parents=True)
    run.model_folder(made.out).mkdir(parents=True)
    save_config(run.config(made.out), run.folder / "config.json")
    made.out.rename(tmp_path / "after")

    made = prepare("table1", [recipe], [], tmp_path / "after", only=["slicegpt"])[0]
    runner.check_folder(made.whole, made.out, 1)
    started = []
    monkeypatch.setattr(runner, "_python", lambda module, log: started.append(module) or 0)
    runner.make_runs(made.study, made.out, 1)
    (run,) = runner.runs_of(made.study, made.out, 1)
    assert started == [["ptl_rl.cli", "resume", str(run.folder)]]
    saved = json.loads((run.folder / "config.json").read_text())
    assert saved["model"]["path"] == str(tmp_path / "after/models/slicegpt-seed0")


def test_the_original_is_no_model_that_was_cut_before(tmp_path):
    made = prepare("table1", [demo_recipes("table1")[1]], [], tmp_path)[0]
    for run in runner.runs_of(made.whole, tmp_path, 1):
        if run.row.name == "slicegpt":
            finish(run, {1, 2}, str(run.model_folder(tmp_path)))
    assert results.original_metrics(made.whole, tmp_path) is None
    text = results.write(made.whole, tmp_path, made.shape, "command")
    assert "The original solves" not in text and "SliceGPT" in text
