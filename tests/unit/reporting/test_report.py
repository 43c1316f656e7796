"""The page says what the journal holds, fetches nothing, and a model card says where its model comes from."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree

import pytest
import torch
import yaml
from run_folders import make_run
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ptl_rl.cli import app
from ptl_rl.config import ConfigError, DataConfig, ModelConfig, ScheduleConfig, SourceConfig
from ptl_rl.config.recipe import save_config
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.errors import OutputError
from ptl_rl.reporting import figures, summary
from ptl_rl.reporting.compare import comparison
from ptl_rl.reporting.export import export_model
from ptl_rl.reporting.html import page
from ptl_rl.reporting.model_card import card
from ptl_rl.reporting.run_data import Removed, RunData


@pytest.fixture
def run(tmp_path):
    return RunData(make_run(tmp_path / "run"))


def test_plans_of_several_cycles_are_laid_on_each_other(run):
    removed = run.removed
    assert removed.layers == [0, 2, 0]
    assert removed.channels == [[0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0, 0]]


@pytest.fixture
def run_in_place(tmp_path):
    """One cut that was made again after a kill, then one that the finished model does not have."""
    folder = make_run(tmp_path / "in_place")
    journal = Journal(folder / "journal.jsonl")
    entries = {(entry.cycle, entry.stage): entry for entry in journal.entries()}
    journal.path.unlink()
    journal.append(entries[0, "evaluate"])
    plans = [[2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1]]
    for place, (part, kept) in enumerate(zip((0, 0, 1), plans, strict=True)):
        cut = folder / f"cycles/001/cuts/{place:03d}"
        cut.mkdir(parents=True)
        before = 8 if part == 0 else 6
        plan = {"source_intermediate_size": before, "keep_channels": [kept] * 3, "keep_layers": [0, 1, 2]}
        (cut / "plan.json").write_text(json.dumps({**plan, "layer_order": []}))
        facts = {"after_step": part, "intermediate_size": len(kept), "notes": [f"of {place}"]}
        artefact = str(cut.relative_to(folder))
        journal.append(Entry(cycle=1, stage="cut", part=part, artefact=artefact, metrics=facts))
    recovered = entries[1, "recover"]
    cuts = [{"after_step": 0, "intermediate_size": 6}]
    metrics = {**recovered.metrics, "cuts": cuts, "notes": ["why"], "validation_accuracy_before": None}
    journal.append(recovered.model_copy(update={"metrics": metrics}))
    for stage in ("evaluate", "gate"):
        journal.append(entries[1, stage])
    return RunData(folder)


def test_of_cuts_in_place_only_those_of_the_finished_model_are_told(run_in_place):
    removed = run_in_place.removed
    assert removed.unit == "cut" and removed.channels == [[0, 0, 0, 0, 0, 0, 1, 1]] * 3
    assert run_in_place.notes == ["cycle 1: of 1", "cycle 1: why"]
    assert run_in_place.cuts_in_place() == [(0, "6")]
    assert [row.sliced_accuracy for row in run_in_place.rows] == [None, None]
    curve = figures.recovery_curves(run_in_place)
    assert curve is not None and ">6<" in curve  # the width that the first step was made with
    assert "cut 1" in figures.removal_map(removed)
    page([run_in_place])
    assert summary._cuts_in_place(run_in_place.entries) == {1: "cut once within one training,\nto 6 channels"}


def test_where_blocks_went_a_cut_tells_how_many_are_left():
    cuts = [{"intermediate_size": 6, "num_hidden_layers": 3}, {"intermediate_size": 6, "num_hidden_layers": 2}]
    assert summary.left_by(cuts, 3) == ["3 blocks x 6", "2 blocks x 6"]
    assert summary.left_by(cuts[1:], 3) == ["2 blocks x 6"]
    assert summary.left_by(cuts[:1], 3) == ["6"] == summary.left_by([{"intermediate_size": 6}], 3)
    entries = [
        Entry(cycle=0, stage="evaluate", metrics={"num_hidden_layers": 3}),
        Entry(cycle=1, stage="recover", metrics={"cuts": cuts}),
    ]
    assert summary._cuts_in_place(entries) == {
        1: "cut 2 times within one training,\nto 3 blocks x 6, 2 blocks x 6 channels"
    }


def test_a_cycle_that_was_taken_back_removed_nothing(tmp_path):
    run = RunData(make_run(tmp_path / "run", decisions=("accept", "stop")))
    assert run.removed.layers == [0, 0, 0]
    assert run.final.cycle == 1


def test_examples_are_of_every_kind_that_there_is(run):
    examples = run.examples(each=1)
    assert [(example.kind, example.original.id) for example in examples] == [
        ("broken", "p7"),
        ("both right", "p0"),
        ("both wrong", "p9"),
    ]
    assert examples[0].final.text == "cycle 2: \\boxed{-1}"


def test_final_model_against_the_original(run):
    against = run.against_original(2)
    assert (against.gained, against.lost) == (0, 2)
    assert against.difference == pytest.approx(-0.2)
    low, high = run.interval(2)
    assert low < 0.7 < high


def test_what_a_cut_left_is_told_with_what_recovery_added(run, tmp_path):
    plain = run.rows
    assert [summary.cells(row, plain[0])["after cut"] for row in plain] == ["", "", ""]
    left = {"accuracy": 0.4, "interval": [0.1, 0.7]}
    added = {"difference": 0.3, "low": 0.1, "high": 0.6, "p_value": 0.0312, "gained": 3, "lost": 0}
    for entry in run.entries:
        if entry.stage == "evaluate":
            entry.metrics["interval"] = [0.5, 0.9]
        if entry.stage == "evaluate" and entry.cycle == 2:
            entry.metrics.update(after_cut=left, recovered=added)
    rows = summary.rows(run.entries)
    assert [summary.cells(row, rows[0])["after cut"] for row in rows] == ["", "", "40.0%, then +30.0 (p = 0.031)"]
    assert (rows[2].sliced_interval, rows[0].interval) == ([0.1, 0.7], [0.5, 0.9])
    summary.plot(run.entries, tmp_path / "cut.png", "made")
    assert (tmp_path / "cut.png").stat().st_size > 10_000
    last = max(i for i, entry in enumerate(run.entries) if entry.stage == "evaluate")
    again = run.entries[last].model_copy(deep=True)
    for told in ("after_cut", "recovered"):
        del again.metrics[told]
    rows = summary.rows([*run.entries, again])  # a second round: what the first one added is not what the row shows
    assert summary.cells(rows[2], rows[0])["after cut"] == "40.0%"


def test_the_page_fetches_nothing_and_shows_text_as_text(run):
    text = page([run])
    assert not re.search(r"""(src|srcset|href)\s*=\s*["'](?!data:)""", text)
    assert "<script" not in text and "url(" not in text and "@import" not in text
    assert "&lt;b&gt;times&lt;/b&gt;" in text and "<b>times" not in text
    for said in ("70.0%", "rounded in 2", "schedule.layers_total", "2.13.0", "0 gained, 2 lost"):
        assert said in text
    assert text.count("<figure>") == text.count('<source media="(max-width: 38rem)" srcset="data:') == 4


@pytest.mark.parametrize("width", [figures.WIDE, figures.NARROW])
def test_pictures_are_well_formed_and_name_what_they_show(run, width):
    drawn = [
        figures.accuracy_by_size([run, run], width),
        figures.time_line(run, width),
        figures.recovery_curves(run, width),
        figures.removal_map(run.removed, width),
    ]
    for svg in drawn:
        assert xml.etree.ElementTree.fromstring(svg).get("width") == f"{72 * width:g}pt"
    assert "reward" in drawn[2] and "cycle 2" in drawn[3] and "recover" in drawn[1]


def test_runs_side_by_side(run, tmp_path):
    other = RunData(make_run(tmp_path / "other", right=(10, 10)))
    first, second = comparison([run, other])
    assert first["against the first"] == "reference"
    assert second["against the first"].startswith("+30.0 points")
    assert second["of the start's"] == "1.111" and second["steps"] == "6"
    assert "2 runs compared" in page([run, other])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_the_page_opens_in_a_browser_without_complaint(run, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page([run]))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command = ["chromium", *options, "--enable-logging=stderr", "--window-size=400,800", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr
    assert "both right" in done.stdout


def test_an_exported_model_has_a_card(run, tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "README.md").write_text("---\nlicense: apache-2.0\n---\nA parent.\n")
    save_config(run.config.model_copy(update={"model": ModelConfig(path=str(parent))}), run.folder / "config.json")
    export_model(run.folder, tmp_path / "out/small", name="small")
    text = (tmp_path / "out/small/README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "apache-2.0" and metadata["tags"] == ["ptl-rl", "pruned", "reasoning"]
    assert "base_model" not in metadata and str(tmp_path) not in text
    assert {path.name for path in (tmp_path / "out/small").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert "3 blocks of 8 FFN channels became 2 of 6" in text
    assert "| 2 | 0 | 1 | 3 steps of GRPO | 70.0% |" in text
    saved = load_file(tmp_path / "out/small/model.safetensors")
    assert torch.equal(saved["weight"], (torch.arange(8.0) / 3).bfloat16()) and saved["steps"].dtype == torch.int64
    assert json.loads((tmp_path / "out/small/config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(OutputError, match="not an empty folder"):
        export_model(run.folder, tmp_path / "out/small", name="small")


def test_an_exported_model_may_have_another_type_and_several_files(run, tmp_path):
    first, second = (run.checkpoint / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (run.checkpoint / "model.safetensors").rename(first)
    save_file({"more": torch.ones(3)}, second)
    export_model(run.folder, tmp_path / "small", name="small", dtype="float32")
    index = json.loads((tmp_path / "small/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"steps": first.name, "weight": first.name, "more": second.name}
    assert load_file(tmp_path / f"small/{second.name}")["more"].dtype == torch.float32
    assert json.loads((tmp_path / "small/config.json").read_text())["dtype"] == "float32"


def test_a_parent_without_a_licence_is_not_given_one(run, tmp_path):
    export_model(run.folder, tmp_path / "small", name="small")
    text = (tmp_path / "small/README.md").read_text()
    assert "license" not in yaml.safe_load(text.split("---")[1])
    assert "licence was not found" in text


def test_a_copied_run_without_its_link_is_exported_all_the_same(run, tmp_path):
    (run.folder / "best").unlink()
    export_model(run.folder, tmp_path / "small", name="small")
    assert (tmp_path / "small/model.safetensors").exists()
    shutil.rmtree(run.folder / "cycles/002/recovered")
    with pytest.raises(ConfigError, match="the journal names this checkpoint, but it is not there"):
        export_model(run.folder, tmp_path / "other", name="other")


def test_a_model_that_was_cut_before_is_not_said_to_be_cut_here(run, tmp_path):
    model = ModelConfig(path=str(tmp_path / "sliced"), parent="some/parent")
    changed = run.config.model_copy(update={"model": model, "schedule": ScheduleConfig(recover_only=True)})
    text = card(RunData(make_run(tmp_path / "other", config=changed)), "small", {})
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "some/parent" and metadata["tags"] == ["ptl-rl", "reasoning"]
    assert "cut by another method" in text and "chosen by" not in text and "before recovery 90.0 %" in text
    assert "start (cut before)" in page([RunData(tmp_path / "other")])


def test_a_card_says_what_the_model_was_judged_on(run, tmp_path):
    assert "problems of `testbed:test` are solved greedily" in card(run, "small", {})
    data = DataConfig(train=SourceConfig(path="/far/away/mine.jsonl"))
    changed = run.config.model_copy(update={"data": data})
    text = card(RunData(make_run(tmp_path / "other", config=changed)), "small", {})
    assert "problems of `mine.jsonl`, held out of training, are solved greedily" in text


def test_a_wide_model_shows_every_cycles_share():
    width, block = 18944, [0] * 18944
    for cycle in range(1, 11):
        for channel in range(1024):
            block[(cycle * 1024 + channel) * 7 % width] = cycle
    shown, in_order = figures.removal_image(Removed([block, list(block)], [0, 3]))
    assert not in_order and shown.shape == (2, figures.MOST_COLUMNS)
    shares = [float((shown[0] == cycle).mean()) for cycle in range(11)]
    assert shares[1:] == pytest.approx([1024 / width] * 10, abs=0.001)
    assert (shown[1] > 0).all()
    assert "sorted by cycle" in figures.removal_map(Removed([block], [0]))


def test_other_problems_of_the_same_names_are_not_compared(run, tmp_path):
    other = RunData(make_run(tmp_path / "other", question="How much is {i}?"))
    assert comparison([run, other])[1]["against the first"] == "other problems"


def test_commands(run, tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["report", str(run.folder), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0 and "70.0%" in (tmp_path / "page.html").read_text()
    done = runner.invoke(app, ["compare", str(run.folder), str(run.folder), "--out", str(tmp_path / "table.md")])
    assert done.exit_code == 0 and "| run | start |" in (tmp_path / "table.md").read_text()
    for command in (["report"], ["compare"], ["export"]):
        extra = [str(tmp_path / "x")] if command == ["export"] else []
        done = runner.invoke(app, [*command, str(tmp_path), *extra])
        assert done.exit_code == 2 and "not a run folder" in done.output


def test_nothing_accepted_is_nothing_to_export(tmp_path):
    folder = make_run(tmp_path / "run", decisions=("stop", "stop"))
    with pytest.raises(ConfigError, match="no cycle was accepted"):
        export_model(folder, tmp_path / "out", name="x")
