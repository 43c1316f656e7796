"""``ptl data`` as a user calls it: what a run reads, for people and for programs."""

import io
import json

import pytest
from data_rows import row, run_config
from rich.console import Console
from typer.testing import CliRunner

from ptl_rl.cli import app
from ptl_rl.config.recipe import save_config
from ptl_rl.data.prepare import training_data
from ptl_rl.data.tokens import count_tokens, local_tokenizer
from ptl_rl.reporting import data_table

LONG = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many in all?"


def ptl_data(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture
def recipe(tmp_path):
    rows = [row(i, solution=f"s{i} " + "and so on " * 50) for i in range(200)]
    rows += [row(200, question="Q7?"), row(201, question=LONG), {"question": "no more"}]
    config = run_config(tmp_path, rows, [row(0, question=LONG)], max_bad_fraction=0.01)
    save_config(config, tmp_path / "recipe.yaml")  # JSON is YAML
    return tmp_path / "recipe.yaml"


def test_for_people(recipe):
    status, output, errors = ptl_data(recipe, "--samples", "1")
    assert status == 0, errors
    plain = " ".join(output.split())
    assert "203 │ 1 │ 0 │ 1 │ 1 │ 200 │ 200" in plain
    assert "train: 2 disjoint subsets of 100 rows: " in plain
    assert "tokens" in plain and "(counted)" in plain
    assert "solution: s" in plain and "and so on and so on..." not in plain and "..." in plain
    assert f"note: data.train: dropped {recipe.parent}/train.jsonl:203: no column 'solution'" in plain
    assert "dropped 1 rows whose question came before" in plain and "train.jsonl:201: repeats" in plain
    assert "dropped 1 rows that hold an evaluation question" in plain and "holds 100% of data.test r0" in plain
    assert "only the very same question" not in plain


def test_subsets_of_a_schedule_that_leaves_its_cuts_to_the_model(recipe):
    opened = "schedule={pace: geometric, cuts: 4, target: {parameters: 0.5}, alignment: 16}"
    status, output, errors = ptl_data(recipe, "--samples", "0", "--set", opened, "--set", "model.path=testbed")
    assert status == 0, errors
    assert "train: 4 disjoint subsets of 50 rows: " in " ".join(output.split())


def test_for_programs(recipe):
    status, output, _ = ptl_data(recipe, "--json")
    assert status == 0
    found = json.loads(output)
    (source,) = found["sets"]["train"]["sources"]
    counts = {"read": 203, "bad": 1, "unanswered": 0, "duplicate": 1, "contaminated": 1, "kept": 200, "used": 200}
    assert source.items() >= counts.items()
    subsets = found["sets"]["train"]["subsets"]
    assert (subsets["count"], subsets["smallest"], subsets["largest"]) == (2, 100, 100)
    assert len(set(subsets["hashes"])) == 2 and found["sets"]["test"]["subsets"] is None
    assert len(found["sets"]["train"]["samples"]) == 3
    assert found["sets"]["train"]["tokens"]["estimate"] is False
    assert any(note.startswith("ptl run refuses this: data.train: 200 rows in 2 subsets") for note in found["notes"])


def test_the_demo(repository):
    status, output, _ = ptl_data(repository / "recipes/demo_restart_cpu.yaml", "--json", "--samples", "0")
    assert status == 0
    found = json.loads(output)
    tokens = found["sets"]["train"]["tokens"]
    assert tokens["estimate"] and tokens["counted"] == 2000
    (note,) = found["notes"]
    assert note.startswith(
        "testbed:rl:4,5, testbed:validation:1,2,3,4,5, testbed:test:1,2,3,4,5: only the very same question counts"
    )
    status, output, _ = ptl_data(
        repository / "recipes/demo_restart_cpu.yaml", "--json", "--samples", "0", "--count-tokens"
    )
    exact = json.loads(output)["sets"]["train"]["tokens"]
    assert not exact["estimate"] and exact["counted"] == 8192
    for part in ("questions", "solutions"):
        assert tokens[part] == pytest.approx(exact[part], rel=0.02)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.train.path=nowhere.jsonl", "error: data.train: nowhere.jsonl: no such file"),
        ("data.test.path=testbed:tset", "error: data.test: testbed:tset: no such split of the test bed"),
        ("data.max_bad_fraction=0", "1 of 203 rows are bad, max_bad_fraction allows 0"),
        ("data.train.rows=1000", "rows is 1000, but there are only 200"),
        ("data.train.rows=1", "the training data has 1 distinct questions, but the run needs 2 subsets"),
        ("data.trian.rows=1", "data.trian: unknown key; did you mean 'train'?"),
        ("data.train.layout=gsm8k", "layout 'gsm8k' is no known corpus"),
    ],
)
def test_bad_input(setting, message, recipe):
    status, output, errors = ptl_data(recipe, "--set", setting)
    assert status == 2 and output == ""
    assert message in errors


def test_without_a_tokenizer(recipe, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, output, _ = ptl_data(recipe, "--json", "--set", "model.path=nobody/has-this-model")
    assert status == 0
    found = json.loads(output)
    assert found["sets"]["train"]["tokens"] is None
    assert "tokens are not counted: nobody/has-this-model has no tokenizer on this machine" in found["notes"]


def test_a_folder_without_a_tokenizer_has_no_tokens(recipe, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "qwen2"}')
    status, output, _ = ptl_data(recipe, "--json", "--set", f"model.path={tmp_path}/model")
    assert status == 0 and json.loads(output)["sets"]["train"]["tokens"] is None


def test_tokens_of_nothing(tmp_path):
    config = run_config(tmp_path)
    tokenizer = local_tokenizer(config.model)
    empty = count_tokens(tokenizer, training_data(config)[:0], "", "train")
    assert (empty.questions, empty.solutions, empty.estimate) == (0, 0, False)


def test_bars_appear_for_what_takes_long(monkeypatch):
    console = Console(force_terminal=True, record=True, width=100, file=io.StringIO())
    now = iter([0.0, 0.1, 0.2, 2.0, 2.1, 2.2, 2.3, 2.4, 3.0])
    monkeypatch.setattr(data_table.time, "monotonic", lambda: next(now))
    with data_table.reading_bars(console) as progress:
        progress("reading quickly", 1, 2)  # each asks for the time twice at first
        progress("reading slowly", 1, 4)
        progress("reading slowly", 2, 4)
    assert "reading slowly" in console.export_text() and "reading quickly" not in console.export_text()
