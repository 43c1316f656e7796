"""``ptl init`` as a user calls it: its recipe is planned and read at once, and bad input is a sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_rows import row, write
from typer.testing import CliRunner

from ptl_rl.cli import app
from ptl_rl.config import ConfigError, FieldMap
from ptl_rl.config.recipe import load_config
from ptl_rl.families import FAMILIES
from ptl_rl.planning.new_recipe import write_recipe
from ptl_rl.planning.schedule import planned_cuts

RECIPE = Path("recipe.yaml")
QWEN = "Qwen/Qwen2.5-7B"
REWARD = "def my_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"
ADVICE = "fields: {question: COLUMN, solution: COLUMN, answer: COLUMN}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def ptl(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def init(model, data, *arguments):
    """The recipe, loaded; ``ptl plan`` and ``ptl data`` accept it."""
    status, output, errors = ptl("init", model, data, *arguments)
    assert status == 0, errors
    assert "wrote recipe.yaml" in output
    for command in ("plan", "data", "doctor", "run"):
        assert f"ptl {command:<6} recipe.yaml" in output
    for command in ("plan", "data"):
        status, output, errors = ptl(command, "recipe.yaml", "--json")
        assert status == 0, errors
        notes = json.loads(output)["notes"]
        assert not [note for note in notes if note.startswith("ptl run refuses this")]
    return load_config(RECIPE), RECIPE.read_text()


def refused(*arguments) -> str:
    status, output, errors = ptl("init", *arguments)
    assert status == 2 and output == "" and errors.startswith("error: ")
    return errors


def renamed(names: dict[str, str], rows: int = 400, **changes) -> list[dict]:
    """Rows whose columns have other names; those without a name go."""
    return [{names[k]: v for k, v in row(i, **changes).items() if k in names} for i in range(rows)]


def test_the_usual_names(tmp_path):
    write(tmp_path / "mine.jsonl", [row(i) for i in range(400)])
    config, text = init(QWEN, "mine.jsonl", "--gpus", "8")
    (source,) = config.data.train_sources
    assert source.path == str(tmp_path / "mine.jsonl") and source.fields is None and source.layout is None
    assert config.name == "Qwen2.5-7B-mine"
    assert (config.model.path, config.model.dtype) == (QWEN, "bfloat16")
    assert config.resources.workers == 8 and config.resources.device == "auto"
    assert len(planned_cuts(config.schedule)) == 5
    assert (config.schedule.channels_per_cycle, config.schedule.channels_total) == (1920, 9472)  # of 18944
    (recovery,) = config.recovery
    assert recovery.method == "grpo" and recovery.prompts_per_step == 8
    assert recovery.steps in (8, 10)  # one pass over a fifth of the rows, less what is held out
    assert "\\boxed{}" in config.data.prompt_suffix
    assert "# test: {path: my_test.jsonl}" in text and "rows of train are held out" in text


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"question": "problem", "solution": "solution", "answer": "answer"}, FieldMap(question="problem")),
        (
            {"question": "Instruction", "solution": "output", "answer": "Final Answer"},
            FieldMap(question="Instruction", solution="output", answer="Final Answer"),
        ),
        (
            {"question": "prompt", "solution": "completion", "answer": "ground_truth", "id": "meta"},
            FieldMap(question="prompt", solution="completion", answer="ground_truth"),
        ),
        ({"question": "question", "answer": "answer"}, FieldMap(solution="answer")),
    ],
)
def test_other_names(names, expected, tmp_path):
    write(tmp_path / "mine.jsonl", [{**r, "level": 3} for r in renamed(names)])
    config, text = init("testbed:llama", "mine.jsonl")
    assert config.data.train_sources[0].fields == expected
    assert config.model.dtype == "float32" and config.data.prompt_suffix == ""
    assert ("no worked solutions" in text) == ("solution" not in names)


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        ({"question": "q{}?", "answer": "<<1+1=2>>It is two.\n#### {}"}, "openai/gsm8k"),
        ({"problem": "q{}?", "solution": "So \\boxed{{{}}}."}, "AI-MO/NuminaMath-CoT"),
        ({"query": "q{}?", "response": "So. The answer is: {}"}, "meta-math/MetaMathQA"),
    ],
)
def test_answers_within_the_solutions(columns, layout, tmp_path):
    write(tmp_path / "mine.jsonl", [{k: v.format(i) for k, v in columns.items()} for i in range(400)])
    config, _ = init("testbed", "mine.jsonl")
    assert config.data.train_sources[0].layout == layout
    status, output, _ = ptl("data", "recipe.yaml", "--json")
    assert status == 0 and all(record["answer"].isdigit() for record in json.loads(output)["sets"]["train"]["samples"])


def test_verls_own_rows(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "extra_info": {"answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"},
        }
        for i in range(400)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mine.parquet")
    config, text = init("testbed", "mine.parquet")
    assert config.data.train.layout == "verl" and config.data.train.fields is None
    assert "# rows as verl reads them: the answer is reward_model.ground_truth" in text
    chats = [{"prompt": row["prompt"], "answer": i + 1} for i, row in enumerate(rows)]
    write(tmp_path / "mine.jsonl", chats)
    config, _ = init("testbed", "mine.jsonl", "--force")
    assert config.data.train.fields.question == "prompt"


def test_answers_beside_worked_ones(tmp_path):
    worked = "Step by step, and then another step. " * 5
    rows = [{"question": f"q{i}?", "answer": f"{worked}{i}", "final_answer": i} for i in range(400)]
    write(tmp_path / "mine.jsonl", rows)
    config, _ = init("testbed", "mine.jsonl")
    assert config.data.train_sources[0].fields == FieldMap(solution="answer", answer="final_answer")


def test_programs_are_run(tmp_path):
    rows = [
        {"text": f"Add {i}.", "code": f"def f(x):\n    return x + {i}", "test_list": [f"assert f(1) == {i + 1}"] * 3}
        for i in range(400)
    ]
    write(tmp_path / "mine.jsonl", [{**r, "test_setup_code": ""} for r in rows])
    config, _ = init(QWEN, "mine.jsonl", "--gpus", "4")
    assert config.data.train_sources[0].layout == "google-research-datasets/mbpp"
    assert config.reward.path == "code" and config.evaluation.judge == "reward" and not config.data.prompt_suffix


@pytest.mark.parametrize("row", [{"text": "Words number {}."}, {"body": "Words number {}.", "id": "r{}"}])
def test_plain_text_is_for_continued_pre_training(row, tmp_path):
    write(tmp_path / "mine.jsonl", [{k: v.format(i) for k, v in row.items()} for i in range(400)])
    errors = refused(QWEN, "mine.jsonl")
    assert "no answers among" in errors and "RL (grpo) is impossible" in errors and "--recovery cpt" in errors
    config, text = init(QWEN, "mine.jsonl", "--recovery", "cpt", "--gpus", "2")
    assert config.data.train_sources[0].fields == FieldMap(text=next(iter(row)))
    assert config.recovery[0].method == "cpt" and "name problems of your own" in text


def test_solutions_without_answers(tmp_path):
    write(tmp_path / "mine.jsonl", renamed({"question": "problem", "solution": "response"}))
    errors = refused("testbed", "mine.jsonl", "--recovery", "distill")
    assert "no answers among problem, response" in errors and "RL (distill) is impossible" in errors
    assert "--fields '{question: problem, solution: response, answer: COLUMN}'" in errors
    config, _ = init("testbed", "mine.jsonl", "--recovery", "cpt")
    assert config.data.train_sources[0].fields == FieldMap(question="problem", solution="response", answer=None)


def test_long_answers_are_solutions(tmp_path):
    rows = [
        {"question": f"q{i}?", "answer": f"Because of {i} reasons that take long to tell. " * 4} for i in range(400)
    ]
    write(tmp_path / "mine.jsonl", rows)
    assert "RL (grpo) is impossible" in refused("testbed", "mine.jsonl")
    config, text = init("testbed", "mine.jsonl", "--recovery", "cpt")
    assert config.data.train_sources[0].fields == FieldMap(solution="answer", answer=None)
    assert "answer holds long texts" in text


@pytest.mark.parametrize("ending", ["parquet", "arrow", "saved"])
def test_other_kinds_of_files(ending, tmp_path):
    rows = renamed({"question": "problem", "solution": "solution", "answer": "answer"})
    path = tmp_path / f"mine.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    config, _ = init("testbed", path.name)
    assert config.data.train_sources[0].fields == FieldMap(question="problem")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family, make_checkpoint, tmp_path):
    write(tmp_path / "mine.jsonl", [row(i) for i in range(400)])
    folder = make_checkpoint(family)
    config, _ = init(folder, "mine.jsonl", "--remove", "25%")
    assert config.model.path == str(folder) and config.model.dtype == "bfloat16"
    assert config.schedule.channels_total == 12  # of 48
    assert config.data.max_prompt_tokens + config.data.max_response_tokens <= 512  # its positions


@pytest.mark.parametrize("split", ["rl", "programs-rl"])
@pytest.mark.parametrize("recovery", ["grpo", "cpt", "distill"])
def test_the_test_bed(split, recovery):
    config, _ = init("testbed:programs" if "-" in split else "testbed", f"testbed:{split}", "--recovery", recovery)
    assert config.data.test.path == f"testbed:{split.removesuffix('rl')}test"
    assert (config.reward.path == "code") == ("-" in split)


@pytest.mark.parametrize(
    ("gpus", "recovery", "share"), [(3, "grpo", 3), (8, "cpt", 8), (6, "grpo", 3), (4, "distill", 3), (2, "distill", 1)]
)
def test_any_number_of_gpus_shares_a_step_equally(gpus, recovery, share, tmp_path):
    write(tmp_path / "mine.jsonl", [row(i) for i in range(400)])
    config, _ = init(QWEN, "mine.jsonl", "--gpus", gpus, "--recovery", recovery)
    (entry,) = config.recovery
    per_step = entry.sequences_per_step if recovery == "cpt" else entry.prompts_per_step
    assert per_step % share == 0 and entry.steps >= 1
    assert config.resources.workers == gpus


def test_no_cycle_is_spent_on_a_small_rest(tmp_path):
    write(tmp_path / "mine.jsonl", [row(i) for i in range(400)])
    config, _ = init("meta-llama/Llama-3.1-8B", "mine.jsonl", "--gpus", "4")  # 14336 wide: a tenth is 11.2 x 128
    assert [cut.channels for cut in planned_cuts(config.schedule)] == [1536] * 4 + [1024]


def test_a_large_model_gets_engines_of_several_gpus(tmp_path):
    write(tmp_path / "mine.jsonl", [row(i) for i in range(400)])
    config, _ = init("Qwen/Qwen2.5-32B", "mine.jsonl", "--gpus", "4")
    assert config.resources.tensor_parallel_size == 2
    assert config.schedule.channels_per_cycle % 256 == 0 and config.schedule.channels_total == 13824


def test_many_rows_bound_the_steps(tmp_path):
    write(tmp_path / "mine.jsonl", [{"question": f"q{i}?", "solution": "s", "answer": i} for i in range(20000)])
    config, text = init(QWEN, "mine.jsonl", "--gpus", "8", "--remove", "10%")
    (recovery,) = config.recovery
    assert (recovery.prompts_per_step, recovery.steps) == (128, 64)
    assert "one pass over" in text and "would be 15" in text


def test_a_reward_is_called_once(tmp_path):
    write(tmp_path / "mine.jsonl", [row(i) for i in range(400)])
    (tmp_path / "mine.py").write_text(REWARD)
    config, _ = init("testbed", "mine.jsonl", "--reward", "mine.py:my_score")
    assert (config.reward.path, config.reward.name) == (str(tmp_path / "mine.py"), "my_score")
    assert "did you mean 'my_score'?" in refused("testbed", "mine.jsonl", "--force", "--reward", "mine.py:my_scor")
    assert "no function 'compute_score'" in refused("testbed", "mine.jsonl", "--force", "--reward", "mine.py")
    assert "my.py does not exist" in refused("testbed", "mine.jsonl", "--force", "--reward", "my.py")
    assert "'my-score' is not the name of a" in refused("testbed", "mine.jsonl", "--force", "--reward", "m.py:my-score")
    (tmp_path / "mine.py").write_text("def my_score(question):\n    return 1.0\n")
    assert "has the signature (question)" in refused("testbed", "mine.jsonl", "--force", "--reward", "mine.py:my_score")


def test_columns_that_cannot_be_told(tmp_path):
    write(tmp_path / "mine.jsonl", [{"foo": f"f{i}", "bar": f"b{i}", "baz": i} for i in range(400)])
    errors = refused("testbed", "mine.jsonl")
    assert "mine.jsonl: no column is named as a question or a text is; the columns are foo, bar, baz" in errors
    assert ADVICE in errors and "--fields" in errors and not RECIPE.exists()
    config, _ = init("testbed", "mine.jsonl", "--fields", "{question: foo, solution: bar, answer: baz}")
    assert config.data.train_sources[0].fields == FieldMap(question="foo", solution="bar", answer="baz")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"problem": "p{}", "prompt": "q{}", "answer": "{}"}, "problem and prompt could each be the question"),
        ({"question": "q{}", "response": "r", "output": "o"}, "response and output could each be the worked solution"),
        (
            {"question": "q{}", "solution": "s", "target": "1", "label": "2"},
            "target and label could each be the answer",
        ),
        ({"question": "q{}", "foo": "f"}, "question is the question, but no column is named as its solution or answer"),
        ({"prompt": [{"role": "user"}], "foo": "f", "bar": "b"}, "prompt hold lists or mappings, not text"),
    ],
)
def test_ambiguous_columns(columns, message, tmp_path):
    rows = [{k: v.format(i) if isinstance(v, str) else v for k, v in columns.items()} for i in range(20)]
    write(tmp_path / "mine.jsonl", rows)
    errors = refused("testbed", "mine.jsonl")
    assert message in errors and ADVICE in errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{question: prblem}", "there is no column 'prblem' or 'solution'; the columns are problem, answer"),
        ("{qestion: problem}", "--fields: qestion: unknown key; did you mean 'question'?"),
        ("problem", "--fields 'problem': write a mapping, as {question: problem,"),
        ("{a: [", "--fields '{a: [': not valid YAML: while parsing a flow node"),
        ("{answer: a, answer: b}", "the key 'answer' twice in one mapping"),
    ],
)
def test_bad_fields(fields, message, tmp_path):
    write(tmp_path / "mine.jsonl", renamed({"question": "problem", "answer": "answer"}))
    assert message in refused("testbed", "mine.jsonl", "--fields", fields)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("0%", "--remove 0%: each layer has 640 FFN channels; more than none and fewer than all can go"),
        ("100%", "--remove 100%: each layer has 640"),
        ("-5%", "--remove -5%: each layer has 640"),
        ("nan%", "--remove nan%: each layer has 640"),
        ("2000", "--remove 2000: each layer has 640"),
        ("half", "--remove half: give a percentage as 50%, or a number of channels"),
        ("%", "--remove %: give a percentage as 50%"),
        ("0.5", "--remove 0.5: give a percentage as 50%, or a number"),
    ],
)
def test_bad_amounts(remove, message):
    assert message in refused("testbed", "testbed:rl", f"--remove={remove}")


@pytest.mark.parametrize(("remove", "total"), [("1%", 64), ("99.9%", 576), ("320", 320), (" 25% ", 128)])
def test_amounts_are_rounded_to_whole_multiples(remove, total):
    assert init("testbed", "testbed:rl", "--remove", remove)[0].schedule.channels_total == total


def test_bad_models_and_data(tmp_path):
    write(tmp_path / "mine.jsonl", [row(0)])
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/config.json").write_text('{"model_type": "gpt2"}')
    assert "model type 'gpt2' is not supported; supported are gemma2" in refused("gpt", "mine.jsonl")
    for name, said in {
        "nowhere": "MODEL: nowhere is not a folder; name a Hugging Face folder, a model of the hub as OWNER/NAME, or",
        "no/model": "offline, download it elsewhere and give its folder as MODEL",
        ".": "config.json does not exist",
    }.items():
        errors = refused(name, "mine.jsonl")
        assert errors.startswith("error: MODEL: ") and said in errors and "model.path" not in errors
    for path in ("hub:", "hub:/"):
        assert f"error: DATA: path: {path!r} names no data set; write hub:OWNER/NAME" in refused("testbed", path)
    assert "testbed:llam: no such checkpoint is shipped" in refused("testbed:llam", "mine.jsonl")
    assert "no.jsonl: no such file" in refused("testbed", "no.jsonl")
    assert "gpt: not a folder that datasets.save_to_disk wrote" in refused("testbed", "gpt")
    assert "testbed:tset: no such split of the test bed" in refused("testbed", "testbed:tset")
    assert "mine.txt: unknown kind of data" in refused("testbed", "mine.txt")
    (tmp_path / "none.jsonl").write_text("")
    assert "none.jsonl: no rows that are JSON objects" in refused("testbed", "none.jsonl")
    (tmp_path / "bad.jsonl").write_text("[1]\nno json\n")
    assert "bad.jsonl: no rows that are JSON objects" in refused("testbed", "bad.jsonl")
    (tmp_path / "bad.parquet").write_text("no parquet")
    assert "bad.parquet: cannot be read, or is not what its name says" in refused("testbed", "bad.parquet")
    assert "distill needs a GPU for the unpruned parent" in refused(
        QWEN, "mine.jsonl", "--recovery", "distill", "--gpus", "1"
    )


def test_one_row_is_not_enough(tmp_path):
    write(tmp_path / "mine.jsonl", [row(0)])
    errors = refused("testbed", "mine.jsonl")
    assert "mine.jsonl: the number of rows that can be used is 1, but each of 5 cycles needs at least 1" in errors
    assert not RECIPE.exists()


def test_malformed_rows_are_named(tmp_path):
    write(tmp_path / "mine.jsonl", [*(row(i) for i in range(400)), "no json"])
    assert "mine.jsonl:401: not valid JSON" in refused("testbed", "mine.jsonl")


def test_nothing_is_overwritten(tmp_path):
    RECIPE.write_text("precious: true\n")
    assert "recipe.yaml: exists; choose another name, or set --force" in refused("testbed", "testbed:rl")
    assert RECIPE.read_text() == "precious: true\n"
    assert init("testbed", "testbed:rl", "--force")[0].model.path == "testbed"
    assert f"{tmp_path}: is a folder" in refused("testbed", "testbed:rl", "--out", tmp_path)
    assert "there is no folder nowhere" in refused("testbed", "testbed:rl", "--out", "nowhere/recipe.yaml")


def test_a_recipe_that_would_be_refused_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match="schedule"):
        write_recipe("name: mine\n", RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_a_name_and_path_that_yaml_must_quote(tmp_path):
    write(tmp_path / "my: rows #1 [ä].jsonl", [row(i) for i in range(400)])
    config, _ = init("testbed", "my: rows #1 [ä].jsonl")
    assert config.data.train_sources[0].path == str(tmp_path / "my: rows #1 [ä].jsonl")
    assert config.name == "testbed-my-rows-1"


def command(repository, *arguments) -> subprocess.CompletedProcess:
    """The command in a process of its own, whose last line tells what it has imported."""
    program = (
        "import sys\nfrom ptl_rl.cli import app\ntry:\n    app()\nfinally:\n"
        "    print('imported', *[m for m in ('torch', 'ray', 'verl', 'transformers') if m in sys.modules])\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, "init", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
        timeout=120,
    )


def test_nothing_heavy_is_imported(tmp_path, repository):
    write(tmp_path / "mine.jsonl", [row(i) for i in range(400)])
    result = command(repository, QWEN, "mine.jsonl")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "imported"


def test_an_interrupt_leaves_nothing(tmp_path, repository):
    """The reward's file, which is executed to be checked, sends what Ctrl-C sends."""
    write(tmp_path / "mine.jsonl", [row(i) for i in range(400)])
    (tmp_path / "mine.py").write_text("import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(30)\n")
    result = command(repository, "testbed", "mine.jsonl", "--reward", "mine.py")
    assert result.returncode == 130 and "nothing was written" in result.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("recipe")]
