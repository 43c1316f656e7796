"""What a model's chat template and its questions' lengths would do to a run is said before Ray starts."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from data_rows import row, run_config

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import parse_config
from ptl_rl.data.prepare import run_data
from ptl_rl.data.prompts import prompt_ids
from ptl_rl.driver.model_checks import ModelChecks, does_without_torch
from ptl_rl.driver.prompt_checks import check_prompts, check_tokenizer
from ptl_rl.testbed import CHECKPOINT_DIR
from ptl_rl.testbed.tokenizer import PAD

LONG = "Which number follows the ones that were named before it? " * 6
GRPO = {"grpo": {"prompts_per_step": 8}}


@pytest.fixture
def model(tmp_path):
    """The tokenizer of the shipped model, and its configurations."""
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def notes(tmp_path, model, train, test=None, recovery=GRPO, most=64, validation=None, suffix=""):
    values = run_config(tmp_path, train, test, validation).model_dump() | {"recovery": recovery}
    values["data"] |= {"max_prompt_tokens": most, "prompt_suffix": suffix}
    config = parse_config(values)
    tokenizer, notes = check_tokenizer(config, model)
    return [*notes, *check_prompts(config, run_data(config, 2), counted_by(tokenizer))]


def counted_by(tokenizer):
    return lambda questions: [len(prompt_ids(tokenizer, question)) for question in questions]


def set_template(model, template):
    (model / "chat_template.jinja").write_text(template)


def test_short_questions_need_no_word(model, tmp_path):
    assert notes(tmp_path, model, [row(i) for i in range(300)]) == []


def test_a_configuration_that_is_none_is_refused_in_a_sentence(model, tmp_path, capfd):
    (model / "config.json").write_text("[1]")
    with ModelChecks(run_config(tmp_path), model) as checks, pytest.raises(ConfigError, match=r"config\.json"):
        checks.notes()
    assert "Traceback" not in capfd.readouterr().err


def test_questions_that_verl_will_leave_out_are_counted(model, tmp_path):
    """With verl's own filter."""
    import pandas
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    rows = [row(i, question=f"{i} {LONG * (i % 3 == 0)}?") for i in range(60)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    most = max(counted_by(tokenizer)(r["question"] for r in rows if LONG not in r["question"]))  # and no token more
    (note,) = notes(tmp_path, model, rows, [row(0, question="?")], most=most, validation=[row(0, question="!")])
    assert note == (
        f"data.train: 20 of 60 questions have more than data.max_prompt_tokens {most} tokens in the chat template and "
        "are left out"
    )
    prompts = [[{"role": "user", "content": r["question"]}] for r in rows]
    pandas.DataFrame({"prompt": prompts}).to_parquet(tmp_path / "rows.parquet")
    settings = {"max_prompt_length": most, "filter_overlong_prompts": True, "cache_dir": str(tmp_path)}
    found = RLHFDataset(str(tmp_path / "rows.parquet"), tokenizer, OmegaConf.create(settings))
    assert len(found) == 40


def test_what_every_question_is_followed_by_counts(model, tmp_path):
    (note,) = notes(tmp_path, model, [row(i, question=f"{i} {LONG * (i % 3 == 0)}?") for i in range(60)])
    assert note.startswith("data.train: 20 of 60 ")
    with pytest.raises(ConfigError, match=r"of the 60 questions of data\.train 60 are longer .* leaves 0 of a subset"):
        notes(tmp_path, model, [row(i) for i in range(60)], suffix=LONG)


def test_too_few_that_are_short_enough_are_refused(model, tmp_path):
    rows = [row(i, question=f"{i} {LONG * (i >= 15)}?") for i in range(60)]
    with pytest.raises(ConfigError, match=r"max_prompt_tokens 64: of the 60 questions of data\.train 45 are longer"):
        notes(tmp_path, model, rows)
    assert notes(tmp_path, model, rows, recovery={"cpt": {"sequences_per_step": 8}}) == []  # which leaves none out
    (note,) = notes(tmp_path, model, rows, recovery={"grpo": {"prompts_per_step": 6}})
    assert "45 of 60" in note
    with pytest.raises(ConfigError, match="and 8 are needed"):  # by the second
        notes(tmp_path, model, rows, recovery=[{"grpo": {"prompts_per_step": 6}}, GRPO])


def test_of_what_is_only_solved_one_that_is_short_enough_will_do(model, tmp_path):
    few = [row(i, question=f"T{i} {LONG * (i > 0)}?") for i in range(4)]
    rows, others = [row(i) for i in range(60)], [{**r, "question": "V" + r["question"]} for r in few]
    found = notes(tmp_path, model, rows, few, validation=others)
    assert [note.split(" questions")[0] for note in found] == ["data.validation: 3 of 4", "data.test: 3 of 4"]
    assert found[0].endswith("left out") and found[1].endswith("cut at their beginning in evaluations")
    with pytest.raises(ConfigError, match=r"of the 3 questions of data\.validation 3 are longer .* leaves 0 of it"):
        notes(tmp_path, model, rows, few, validation=others[1:])


def test_of_many_questions_all_are_counted_if_one_that_is_looked_at_is_too_long(tmp_path):
    """Of 401 every other one is looked at."""
    values = run_config(tmp_path).model_dump() | {"recovery": {"cpt": {}}}
    config = parse_config(values | {"data": values["data"] | {"max_prompt_tokens": 64, "prompt_suffix": ""}})
    counted = []

    def tokens(questions):
        counted.append([len(question) for question in questions])
        return counted[-1]

    def checked(*long):
        questions = [SimpleNamespace(question="q" * (65 if i in long else 64)) for i in range(401)]
        return check_prompts(config, SimpleNamespace(sets={"test": questions}), tokens)

    (note,) = checked(398, 399)
    assert note.startswith("data.test: 2 of 401 questions") and [len(lengths) for lengths in counted] == [201, 401]
    assert checked(399) == [] and len(counted) == 3


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% for message in messages %}{{ message['content'] }", "unexpected '}'"),
        ("{{ messages[0]['text']['more'] }}", "no attribute 'text'"),
    ],
)
def test_a_template_that_fails_is_refused(model, tmp_path, template, reason):
    set_template(model, template)
    with pytest.raises(ConfigError, match=rf"its chat template cannot be put to a question \(.*{re.escape(reason)}"):
        check_tokenizer(run_config(tmp_path), model)


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerBase", "PreTrainedConfig"])
def test_what_cannot_be_written_back_is_refused(model, tmp_path, monkeypatch, kind):
    def fails(*arguments, **options):
        raise TypeError("Object of type set is not JSON serializable")

    monkeypatch.setattr(f"transformers.{kind}.save_pretrained", fails)
    with pytest.raises(ConfigError, match=r"cannot be written back, .*\(Object of type set is not JSON"):
        notes(tmp_path, model, [row(i) for i in range(60)])


def test_a_configuration_that_workers_alone_know_is_not_looked_at(model, tmp_path, monkeypatch):
    """Of a model that SliceGPT made; transformers is told of it in the workers."""

    def unknown(*arguments, **options):
        raise ValueError("The checkpoint you are trying to load has model type `slicegpt_llama`")

    values = json.loads((model / "config.json").read_text()) | {"model_type": "slicegpt_llama"}
    (model / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unknown)
    tokenizer, found = check_tokenizer(run_config(tmp_path), model)
    assert tokenizer.eos_token == "<|im_end|>" and found == []


def test_a_template_that_ends_answers_in_words_is_no_matter(model, tmp_path):
    set_template(model, "{% for m in messages %}{{ m['content'] }}\nOver.\n{% endfor %}")
    assert notes(tmp_path, model, [row(i) for i in range(60)]) == []


def test_a_template_that_ends_answers_where_generation_does_not(model, tmp_path):
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {"eos_token": PAD}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    pad = json.loads((model / "config.json").read_text())["pad_token_id"]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": pad}))
    (note,) = notes(tmp_path, model, [row(i) for i in range(60)])
    assert "ends an answer with '<|im_end|>', but generation stops at '<|endoftext|>' alone" in note
    (model / "generation_config.json").write_text(json.dumps({}))
    settings["eos_token"] = None
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="nothing ends an answer"):
        notes(tmp_path, model, [row(i) for i in range(60)])


def test_a_template_that_opens_the_thinking_is_known_to_the_format_reward(model, tmp_path):
    from reward.style import format_reward

    closed, whole = "2 and 2.</think> So \\boxed{4}.", "<think>2 and 2.</think> So \\boxed{4}."
    assert [format_reward(text, "think_boxed", think_opened=True) for text in (closed, whole)] == [1.0, 0.0]
    assert [format_reward(text, "think_boxed") for text in (closed, whole)] == [0.0, 1.0]


def test_the_process_gives_its_verdict_and_counts_as_this_one_does(model, tmp_path, monkeypatch):
    """Whatever lies in the folder that a run is started in, and whatever libraries print."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here/transformers.py").write_text("raise SystemExit('not the library')")
    (tmp_path / "path").mkdir()
    (tmp_path / "path/transformers.py").write_text(
        "import sys\nprint('a library speaks')\nsys.path.remove(__file__.rpartition('/')[0])\n"
        "del sys.modules['transformers']\nimport transformers\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [f"{tmp_path}/path", os.environ.get("PYTHONPATH")])))
    questions = ["q?", LONG, "über\nzwei"]
    with ModelChecks(run_config(tmp_path), model) as checks:
        assert os.getsid(checks.process.pid) == checks.process.pid  # a Ctrl-C in the terminal is not sent to it
        told = []
        checks.watched(lambda *what: told.append(what))("rows", 1, 2)
        assert told == [("rows", 1, 2)]
        tokenizer, notes = check_tokenizer(run_config(tmp_path), model)
        assert checks.notes() == notes
        for some in (questions, [], questions * 2000):
            assert checks.prompt_tokens(some) == counted_by(tokenizer)(some)
    assert checks.process.returncode == -9


@pytest.mark.parametrize(
    ("trusted", "settings", "without"),
    [
        (False, {}, True),
        (False, {"dtype": "bfloat16"}, True),
        (False, {"torch_dtype": "bfloat17"}, False),
        (False, {"dtype": ["float32"]}, False),
        (True, {}, False),
    ],
)
def test_the_process_imports_torch_where_only_torch_can_tell(trusted, settings, without, model, tmp_path):
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | settings))
    config = parse_config(run_config(tmp_path).model_dump() | {"model": {"trust_remote_code": trusted}})
    assert does_without_torch(config, model) is without


def test_a_model_is_refused_while_the_rows_are_still_read(model, tmp_path):
    set_template(model, "{{ raise_exception('no users here') }}")
    with ModelChecks(run_config(tmp_path), model) as checks:
        assert checks.process.wait(60) == 0
        with pytest.raises(ConfigError, match="no users here"):
            checks.watched(lambda *_: None)("rows", 1, 2)


def test_a_check_that_fails_by_itself_is_no_verdict(model, tmp_path):
    with ModelChecks(run_config(tmp_path), model) as checks:
        checks.process.kill()
        with pytest.raises(RuntimeError, match="ended with status -9"):
            checks.notes()
        with pytest.raises(RuntimeError, match="ended with status -9"):
            checks.prompt_tokens(["q?"])
