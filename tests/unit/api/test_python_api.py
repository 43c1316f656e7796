"""The Python interface: what importing costs, and that the examples of its page run as they stand."""

import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

import ptl_rl
from ptl_rl import api
from ptl_rl.config.recipe import override_text

HEAVY = ("torch", "ray", "verl", "vllm", "transformers", "datasets", "pydantic")


def examples(repository: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (repository / "docs/python-api.md").read_text(), re.DOTALL)


def test_importing_loads_nothing_heavy():
    code = f"import ptl_rl; ptl_rl.score, ptl_rl.run; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_names_are_there_and_others_are_not(repository):
    assert set(ptl_rl.__all__) <= set(dir(ptl_rl))
    for name in ptl_rl.__all__:
        assert getattr(ptl_rl, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        _ = ptl_rl.scores
    assert (Path(ptl_rl.__file__).parent / "py.typed").exists()
    page = (repository / "docs/python-api.md").read_text()
    functions = [name for name in ptl_rl.__all__ if inspect.isfunction(getattr(ptl_rl, name))]
    assert functions and all(f"`{name}(" in page for name in functions)


def test_everything_is_typed_and_documented():
    for name in ptl_rl.__all__:
        found = getattr(ptl_rl, name)
        if inspect.isfunction(found):
            parameters = inspect.signature(found).parameters.values()
            assert all(parameter.annotation is not parameter.empty for parameter in parameters), name
            assert inspect.signature(found).return_annotation is not inspect.Signature.empty, name


@pytest.mark.parametrize("value", [4, 0.5, True, None, "off", "a: b", [1, 2], {"grpo": {"steps": 2}}, "1e-3", ""])
def test_a_setting_reads_as_the_value_that_was_given(value):
    key, _, text = override_text("a.b", value).partition("=")
    assert key == "a.b" and yaml.safe_load(text) == value


def test_the_example_of_one_cut_runs(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = [code for code in examples(repository) if "ptl_rl.score(" in code]
    exec(compile(example, "docs/python-api.md", "exec"), {})
    assert "logits differ" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    sliced = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced")
    whole = ptl_rl.load_recipe(repository / "recipes/demo_cpt_llama_cpu.yaml").model.path
    assert whole == "testbed:llama" and sliced.config.intermediate_size % 16 == 0


def test_the_example_of_an_error_runs(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    (example,) = [code for code in examples(repository) if "UserError" in code]
    exec(compile(example, "docs/python-api.md", "exec"), {})
    assert "unknown key; did you mean 'steps'?" in capsys.readouterr().out


def test_the_example_of_a_run_passes_every_check(repository, tmp_path, monkeypatch, capsys):
    """All but the work: the driver's part is replaced by what a finished run's folder gives."""
    monkeypatch.chdir(repository)
    (example,) = [code for code in examples(repository) if "ptl_rl.run(" in code]
    example = example.replace("runs/mine", str(tmp_path / "mine"))
    reported: list[str] = []
    row = typing.cast(typing.Any, type("Row", (), {"cycle": 0, "parameters": 7, "accuracy": 0.5}))

    def finished(folder, *, console=None):
        assert (Path(folder) / "config.json").exists() and console is not None
        return api.RunResult(Path(folder), None, False, [row])

    monkeypatch.setattr(api, "resume", finished)
    monkeypatch.setattr(ptl_rl, "report", reported.append, raising=False)
    exec(compile(example, "docs/python-api.md", "exec"), {})
    shown = capsys.readouterr().out
    assert f"run folder: {tmp_path / 'mine'}" in shown and "0 7 0.5" in shown and "None" in shown
    assert reported == [str(tmp_path / "mine")]
    assert "\x1b" not in shown  # no control of a screen outside a terminal
    saved = ptl_rl.config.recipe.read_saved_config(tmp_path / "mine/config.json")
    assert saved.seed == 1 and saved.recovery[0].steps == 8


OPEN = "schedule={pace: geometric, cuts: 2, target: {intermediate_size: 0.25}, alignment: 16}"


def test_the_recipe_that_a_run_keeps_names_its_cuts(repository, tmp_path, monkeypatch):
    """So that every stage, and every resume, reads the same ones."""
    monkeypatch.setattr("ptl_rl.driver.preflight.check", lambda *given: [])
    api.start(ptl_rl.load_recipe(repository / "recipes/demo_restart_cpu.yaml", [OPEN]), tmp_path / "run")
    saved = ptl_rl.config.recipe.read_saved_config(tmp_path / "run/config.json")
    assert saved.schedule.channel_steps == [320, 160] and not saved.schedule.is_open
    (tmp_path / "run/journal.jsonl").write_text("{}\n")
    monkeypatch.setattr("ptl_rl.driver.preflight.settle", lambda *_: pytest.fail("measured for minutes, then refused"))
    with pytest.raises(ptl_rl.UserError, match="already holds a run"):
        api.start(ptl_rl.load_recipe(repository / "recipes/demo_restart_cpu.yaml", [OPEN]), tmp_path / "run")


def test_settings_of_a_recipe_that_is_read_already_are_refused(repository):
    recipe = ptl_rl.load_recipe(repository / "recipes/demo_restart_cpu.yaml")
    with pytest.raises(ptl_rl.UserError, match="this recipe is read already"):
        ptl_rl.run(recipe, settings={"seed": 3})


def test_what_a_function_refuses_is_one_kind(tmp_path):
    for call in (
        lambda: ptl_rl.resume(tmp_path),
        lambda: ptl_rl.report([tmp_path]),
        lambda: ptl_rl.slice("testbed", tmp_path / "none", tmp_path / "out"),
        lambda: ptl_rl.score("no/such folder", "testbed:rl", tmp_path / "out"),
        lambda: ptl_rl.evaluate("testbed", ["gsm9k"], tmp_path / "out"),
        lambda: ptl_rl.evaluate("testbed", ["boxed"], tmp_path / "out", data={"boxed": "testbed:test"}, limit=0),
        lambda: ptl_rl.load_recipe("r.yaml", "seed=1"),
        lambda: ptl_rl.load_recipe("r.yaml", {"seed": object()}),
        lambda: ptl_rl.score("testbed", "testbed:rl", tmp_path / "out", alignment=0),
        lambda: ptl_rl.report([]),
    ):
        with pytest.raises(ptl_rl.UserError):
            call()
