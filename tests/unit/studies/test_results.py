"""What finished runs amount to; the runs here are journals and sample tables as the driver leaves them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from ptl_rl.config import ConfigError
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.driver.state import fold, next_stage
from ptl_rl.recipe import save_config
from ptl_rl.studies import results, runner
from ptl_rl.studies.command import prepare

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


def finish(run, solved, model=None):
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
            extra = metrics(right, 1000 if stage.cycle == 0 else 400)
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
    assert results.write(made.study, made.out, 2, "command") is None


def test_a_line_per_row_with_seeds_put_together(made):
    for run in runner.runs_of(made.study, made.out, 2):
        if run.row.name == "cuts-1":
            finish(run, set(range(30 + run.seed)))
        elif run.row.name == "cuts-2":
            finish(run, set(range(20)))
        elif run.row.name == "cuts-4" and run.seed == 0:
            finish(run, set(range(30)))
    lines = {line.row.name: line for line in results.collect(made.study, made.out, 2)}
    assert set(lines) == {"cuts-1", "cuts-2", "cuts-4"}
    assert lines["cuts-1"].accuracies == [0.75, 31 / 40]
    assert lines["cuts-1"].mean == pytest.approx(30.5 / 40)
    assert lines["cuts-1"].low < lines["cuts-1"].mean < lines["cuts-1"].high
    assert lines["cuts-1"].original == pytest.approx(0.95)
    against = lines["cuts-2"].against
    assert against.difference == pytest.approx(-10.5 / 40)
    assert against.p_value < 0.05 and (against.gained, against.lost) == (0, 11)
    # Other seeds than the reference's: no comparison.
    assert lines["cuts-4"].against is None
    assert lines["cuts-4"].steps == 120

    text = results.write(made.study, made.out, 2, "ptl study iterations --seeds 2")
    assert "The highest mean is that of 1 cut with 76.2%" in text
    assert "2 cuts: worse than 1 cut" in text
    assert "| 2 cuts | 400 (40%) | 40% | 50.0% |" in text
    assert "`ptl study iterations --seeds 2`" in text
    assert (made.out / "figure.png").stat().st_size > 5000
    found = json.loads((made.out / "results.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["cuts-1", "cuts-2", "cuts-4"]
    assert found["rows"][1]["against"]["lost"] == 11


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


def test_runs_of_another_design_are_not_mixed_in(made, tmp_path):
    finish(runner.runs_of(made.study, made.out, 1)[0], {1})
    other = prepare("iterations", [], ["data.test.rows=7"], made.out)[0]
    with pytest.raises(ConfigError, match="was made with another data; name another --out"):
        runner.make_runs(other.study, other.out, 1)
