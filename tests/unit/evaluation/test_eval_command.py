import json

import pytest
from typer.testing import CliRunner

from ptl_rl import api
from ptl_rl.cli import app
from ptl_rl.config import ConfigError, EvalConfig
from ptl_rl.errors import UserError
from ptl_rl.evaluation import command
from ptl_rl.evaluation.tasks import TASKS
from ptl_rl.testbed import CHECKPOINT_DIR


def config(**changes):
    return EvalConfig(**{"tasks": ["boxed"], "data": {"boxed": "testbed:test"}, "limit": 4} | changes)


def test_entries_of_data():
    for entry, says in [("gsm8k", "give TASK=FILE"), ("mbpp=x", "none of the tasks"), ("gsm8k=", "give TASK=FILE")]:
        result = CliRunner().invoke(app, ["eval", "testbed", "--tasks", "gsm8k,boxed", "--data", entry])
        assert result.exit_code == 2 and "error: --data" in result.output and says in result.output
    with pytest.raises(ConfigError, match=r"a=b\.jsonl: .*\(`data` gsm8k=FILE names another source\)"):
        command.prepare("testbed", config(tasks=["gsm8k"], data={"gsm8k": "a=b.jsonl"}))


def test_a_task_without_questions_asks_for_them():
    with pytest.raises(ConfigError, match=r"whose questions\? Name them: `data` boxed=FILE"):
        command.prepare("testbed", config(data={}))


def test_results_depend_on_what_changes_them_and_on_nothing_else():
    def key(**changes):
        return command.prepare("testbed", config(**changes))[1][0].key

    assert key() == key(batch_size=7, tasks=["boxed"])
    assert len({key(), key(limit=5), key(max_tokens=9), key(prompt_suffix="!"), key(dtype="bfloat16")}) == 5


def test_the_response_leaves_room_for_a_prompt():
    window = command.context_window(CHECKPOINT_DIR, config())
    task = TASKS["boxed"]
    assert command.response_tokens(task, config(), window) == window // 2
    assert command.response_tokens(task, config(max_tokens=9), window) == 9
    with pytest.raises(ConfigError, match="max_tokens"):
        command.response_tokens(task, config(max_tokens=window), window)
    assert [command.context_window(CHECKPOINT_DIR, config(max_model_tokens=n)) for n in (9, 10**6)] == [9, 512]


def test_the_zero_shot_prompt_is_that_of_training():
    from transformers import AutoTokenizer

    from ptl_rl.data.prompts import prompt_ids

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    question = "Mia has 3 apples and buys 4. How many has she?"
    text = command.zero_shot_prompt(tokenizer, question)
    assert tokenizer.encode(text, add_special_tokens=False) == list(prompt_ids(tokenizer, question))


def test_a_broken_results_file_is_named(tmp_path):
    (tmp_path / command.RESULTS).write_text("{")
    with pytest.raises(ConfigError, match=r"results\.json: not what ptl eval writes"):
        command.read_results(tmp_path)
    assert command.read_results(tmp_path / "none") == {}


def test_finished_tasks_are_not_made_again(tmp_path, monkeypatch):
    folder, prepared = command.prepare("testbed", config())
    figures = {"key": prepared[0].key, "accuracy": 0.5, "model_identity": command._identity(folder)}
    (tmp_path / command.RESULTS).write_text(json.dumps({"model": "m", "tasks": {"boxed": figures}}))
    monkeypatch.setattr(command, "make_model", lambda *_, **__: pytest.fail("loads a model for nothing"))
    found = command.evaluate_model(folder, prepared, config(), tmp_path)
    assert found["tasks"] == {"boxed": figures}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["testbed", "--tasks", "gsm8q"], "did you mean 'gsm8k'"),
        (["nowhere", "--tasks", "boxed", "--data", "boxed=testbed:test"], "model: nowhere is not a folder"),
        (["testbed", "--tasks", "boxed", "--data", "boxed=no.jsonl"], "no.jsonl: no such file"),
        (["testbed", "--tasks", "boxed", "--data", "boxed=testbed:test", "--dtype", "int3"], "dtype"),
    ],
)
def test_bad_input_is_refused_with_its_name(arguments, says, monkeypatch):
    monkeypatch.setattr(command, "quieten_libraries", lambda: None)
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 2
    assert says in result.output


def test_all_tasks_are_listed():
    result = CliRunner().invoke(app, ["eval", "--list-tasks"])
    assert result.exit_code == 0
    assert all(name in result.output for name in TASKS)


def test_flops_of_an_answer_are_the_sum_over_its_tokens():
    from ptl_rl.families import read_shape

    shape = read_shape(CHECKPOINT_DIR)
    by_token = [shape.flops_per_token(context_tokens=place + 1, output_head=place >= 7) for place in range(10)]
    assert command.flops_per_answer(shape, 7, 3) == pytest.approx(sum(by_token))


def test_results_of_another_model_are_not_carried_on(tmp_path, monkeypatch):
    folder, prepared = command.prepare("testbed", config())
    figures = {"key": prepared[0].key, "model_identity": "another"}
    (tmp_path / command.RESULTS).write_text(json.dumps({"model": "m", "tasks": {"boxed": figures}}))

    class Loaded(Exception):
        pass

    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(command, "make_model", load)
    monkeypatch.setattr(command, "prepare_machine", lambda: True)
    with pytest.raises(Loaded):
        command.evaluate_model(folder, prepared, config(), tmp_path)


def test_every_model_has_a_default_folder_of_its_own(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name / "best").mkdir(parents=True)
    folders = {command.default_folder(str(tmp_path / name / "best")) for name in ("a", "b")}
    assert len(folders) == 2 and all(folder.parent.name == "evaluations" for folder in folders)
    assert command.default_folder("testbed:llama").name == "testbed-llama"
    monkeypatch.chdir(tmp_path / "a")
    assert command.default_folder(".") == command.default_folder(str(tmp_path / "a"))


def test_only_the_command_line_closes_its_own_streams(monkeypatch):
    """A notebook's standard error is not this project's to close."""
    told = []
    monkeypatch.setattr(command.atexit, "register", told.append)
    with pytest.raises(UserError):
        api.evaluate("testbed", ["no such task"])
    assert told == []
    CliRunner().invoke(app, ["eval", "testbed", "--tasks", "no such task"])
    assert len(told) == 1
