"""What is found wrong before Ray starts, and cannot be shown end to end without breaking the machine."""

import json
import shutil
from collections import namedtuple

import pytest
from data_rows import row, run_config, write

from ptl_rl import attention
from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config, parse_config
from ptl_rl.driver import preflight
from ptl_rl.evaluation.speed import Spread
from ptl_rl.evaluation.speed_target import NotMeasured, OutOfReach
from ptl_rl.testbed import CHECKPOINT_DIR

Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_the_run_would_fill_is_refused(repository, tmp_path, monkeypatch):
    config = load_config(repository / "recipes/demo_restart_cpu.yaml")
    model, shape = preflight.check_model(config)
    # 640 channels become 384 and 256; each cut and each recovered model stays, in float32,
    # but for the first cut, which has the original's bfloat16.
    needed = 8 * (1_428_672 + 1_133_760) - 2 * 1_428_672
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(2**40, 0, needed - 1))
    with pytest.raises(ConfigError, match=r"the run writes up to .* GiB of checkpoints, .* choose another `run_dir`"):
        preflight.check_disk(config, shape, model, tmp_path / "not" / "there" / "yet")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(2**40, 0, needed))
    preflight.check_disk(config, shape, model, tmp_path)


def test_dropped_rows_are_noted_and_small_subsets_refused(tmp_path):
    rows = [row(i) for i in range(40)] + ["nonsense", row(41, question="Q3?"), row(42, question="The only question.")]
    values = run_config(tmp_path, rows, [row(0, question="the only question")], max_bad_fraction=0.1).model_dump()
    values["recovery"] = [{"method": "grpo", "prompts_per_step": 20}]
    data = preflight.check_data(parse_config(values))
    train = tmp_path / "train.jsonl"
    bad, repeated, copied = data.notes()
    assert bad.startswith(f"data.train: dropped {train}:41: not valid JSON")
    assert repeated == f"data.train: dropped 1 rows whose question came before: {train}:42: repeats {train}:4"
    assert copied.endswith(f"{train}:43: holds 100% of data.test r0")
    values["recovery"][0]["prompts_per_step"] = 21
    with pytest.raises(
        ConfigError, match=r"data\.train: 40 rows in 2 subsets leave 20 in a subset, but recovery\.prompts"
    ):
        preflight.check_data(parse_config(values))
    values["recovery"] = [{"method": "cpt", "sequences_per_step": 21}]
    with pytest.raises(ConfigError, match=r"leave 20 in a subset, but recovery\.sequences_per_step is 21; give more"):
        preflight.check_data(parse_config(values))
    values["data"]["train"]["path"] = str(tmp_path / "no.jsonl")
    with pytest.raises(ConfigError, match=r"data\.train: .*no\.jsonl: no such file"):
        preflight.check_data(parse_config(values))


def test_cpt_on_solutions_that_the_judge_cannot_read_is_noted(repository, tmp_path):
    boxed = [row(i, solution=f"So \\boxed{{{i}}}.") for i in range(20)]

    def notes(rows, recovery="cpt", **values) -> list[str]:
        recipe = run_config(tmp_path, rows).model_dump() | values
        config = parse_config(recipe | {"recovery": {recovery: {"sequences_per_step": 1} if recovery == "cpt" else {}}})
        found = preflight.data_notes(config, preflight.run_data(config, 1))
        return [note for note in found if "evaluation.judge" in note]

    (note,) = notes([row(i) for i in range(20)])
    assert note.startswith("data.train: 0 of 20 worked solutions that were looked at have a \\boxed{}, by which")
    assert "end them in \\boxed{ANSWER}, or judge by your own function (evaluation.judge: reward, reward" in note
    assert notes([*boxed[:1], *(row(i) for i in range(1, 20))])[0].startswith("data.train: 1 of 20 ")
    assert notes(boxed) == notes([*boxed[:2], *(row(i) for i in range(2, 20))]) == []
    assert notes([row(i) for i in range(20)], "grpo") == []
    assert notes([row(i) for i in range(20)], evaluation={"judge": "reward"}, reward={"path": "code"}) == []
    for recipe in ("demo_cpt_llama_cpu", "demo_cpt_gemma2_cpu", "demo_cpt_grpo_cpu"):
        config = load_config(repository / f"recipes/{recipe}.yaml")
        assert preflight.box_notes(config, preflight.run_data(config, 1)) == []


def test_the_reward_is_tried_on_the_training_data(tmp_path):
    reward = tmp_path / "my_reward.py"
    reward.write_text(
        "def score(data_source, solution_str, ground_truth, extra_info=None): raise KeyError(solution_str)"
    )
    values = run_config(tmp_path, [row(7)]).model_dump() | {"reward": {"path": str(reward), "name": "score"}}
    values["schedule"] = {"channels_per_cycle": [64], "alignment": 32}
    values["recovery"] = [{"method": "grpo", "prompts_per_step": 1}]
    config = parse_config(values)
    with pytest.raises(ConfigError, match=r"reward: .*s7.* \(on data\.train\)"):
        preflight.check_reward(config, preflight.check_data(config))
    values["recovery"] = [{"method": "cpt", "sequences_per_step": 1}]
    config = parse_config(values)
    preflight.check_reward(config, preflight.check_data(config))
    config = parse_config(values | {"evaluation": {"judge": "reward"}})
    with pytest.raises(ConfigError, match=r"\(on data\.test\)"):
        preflight.check_reward(config, preflight.check_data(config))


def test_the_reward_is_tried_on_what_grpo_validates_on(tmp_path):
    reward = tmp_path / "my_reward.py"
    body = "if data_source == 'validation': raise KeyError('no such thing')\n    return 1.0"
    reward.write_text(f"def score(data_source, solution_str, ground_truth, extra_info=None):\n    {body}\n")
    values = run_config(tmp_path, [row(7)]).model_dump() | {"reward": {"path": str(reward), "name": "score"}}
    values["schedule"] = {"channels_per_cycle": [64], "alignment": 32}
    values["recovery"] = [{"method": "grpo", "prompts_per_step": 1}]
    config = parse_config(values)
    with pytest.raises(ConfigError, match=r"reward: .*no such thing.* \(on data\.validation\)"):
        preflight.check_reward(config, preflight.check_data(config))
    values["recovery"] = [{"method": "grpo", "prompts_per_step": 1, "validate_before": False}]
    config = parse_config(values)
    preflight.check_reward(config, preflight.check_data(config))


def test_what_the_model_cannot_read_is_refused(tmp_path):
    """vLLM would say so once it has started, minutes later."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')

    def lengths(**values):
        recipe = {"schedule": {"channels_per_cycle": [16], "alignment": 16}, **values}
        return preflight.check_lengths(parse_config(recipe | {"model": {"path": "my/model"}}), tmp_path)

    with pytest.raises(
        ConfigError, match=r"max_prompt_tokens 1024 and data\.max_response_tokens 3072 .* 2048 tokens that my"
    ):
        lengths()
    fitting = {"max_prompt_tokens": 1024, "max_response_tokens": 1024}
    assert lengths(data=fitting) == []
    with pytest.raises(ConfigError, match=r"evaluation\.max_response_tokens 1025 are more than the 2048"):
        lengths(data=fitting, evaluation={"max_response_tokens": 1025})
    long = fitting | {"max_response_tokens": 4000}
    evaluated = {"evaluation": {"max_response_tokens": 512}}
    with pytest.raises(ConfigError, match=r"data\.max_response_tokens 4000"):
        lengths(data=long, **evaluated)
    notes = lengths(data=long, recovery=[{"cpt": {}}], **evaluated)  # only evaluation writes
    assert [note.split(";")[0] for note in notes] == [
        "recovery.max_tokens 4096 is more than the 2048 tokens that the model can read at once"
    ]
    (tmp_path / "config.json").write_text(
        '{"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}'
    )
    assert lengths() == []
    (tmp_path / "config.json").write_text("{}")
    assert lengths() == []


def test_rl_needs_a_chat_template_and_continued_pretraining_does_not(tmp_path):
    values = {"schedule": {"channels_per_cycle": [16], "alignment": 16}}
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    with pytest.raises(ConfigError, match=r"has no chat template, which grpo and distill need; put a chat_template"):
        preflight.check_chat_template(parse_config(values), tmp_path)
    preflight.check_chat_template(parse_config({**values, "recovery": [{"cpt": {}}]}), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    preflight.check_chat_template(parse_config(values), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="has no chat template"):
        preflight.check_chat_template(parse_config(values), tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        preflight.check_chat_template(parse_config(values), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    preflight.check_chat_template(parse_config(values), tmp_path)


class Checks:
    """In place of the process that looks at the model."""

    def __init__(self, config, model):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def watched(self, progress):
        return progress

    def notes(self):
        return ["the template's note"]

    def prompt_tokens(self, questions):
        return [999 if "test" in question else 9 for question in questions]


class Refusing(Checks):
    def watched(self, progress):
        def watching(*_):
            raise ConfigError("refused while rows are read")

        return watching


def test_a_run_is_told_of_its_lengths_and_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "ModelChecks", Checks)
    test = [row(i, question=f"test {i}?" if i else "short?") for i in range(3)]
    values = run_config(tmp_path, test=test).model_dump()
    values["recovery"] = {"cpt": {"sequences_per_step": 1, "max_tokens": 600}}
    values["data"] |= {"max_prompt_tokens": 256, "max_response_tokens": 256}
    found = preflight.check(parse_config(values), tmp_path / "run")
    for note in ("recovery.max_tokens 600 is more than the 512", "the template's note", "data.test: 2 of 3 questions"):
        assert any(said.startswith(note) for said in found)
    monkeypatch.setattr(preflight, "ModelChecks", Refusing)
    rows = [row(i, question=f"Not read before, {i}?") for i in range(20)]
    values["data"]["train"] = {"path": str(write(tmp_path / "new.jsonl", rows).path)}
    with pytest.raises(ConfigError, match="refused while rows are read"):
        preflight.check(parse_config(values), tmp_path / "run")
    values["data"]["max_response_tokens"] = 257
    with pytest.raises(ConfigError, match=r"max_response_tokens 257 are more than the 512 tokens that testbed"):
        preflight.check(parse_config(values), tmp_path / "run")


def test_a_run_of_contrast_or_without_a_template_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "ModelChecks", Refusing)
    values = run_config(tmp_path).model_dump() | {"recovery": {"grpo": {"prompts_per_step": 1}}}
    values["data"] |= {"max_prompt_tokens": 256, "max_response_tokens": 256}
    text = write(tmp_path / "text.jsonl", [{"text": f"Some text that nobody read, {i}."} for i in range(9)])
    values["criterion"] = {"channels": "ptl_reference", "contrast": {"data": {"path": text.path}}}
    monkeypatch.setattr(preflight, "check_data", None)
    with pytest.raises(ConfigError, match="refused while rows are read"):
        preflight.check(parse_config(values), tmp_path / "run")
    model = shutil.copytree(CHECKPOINT_DIR, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    values["model"] = {"path": str(model)}
    with pytest.raises(ConfigError, match="has no chat template"):
        preflight.check(parse_config(values), tmp_path / "run")


def test_padding_is_said_before_the_run_and_flash_attention_that_is_missing_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "detect_device", lambda config: "cuda")
    monkeypatch.setattr(attention, "flash_problem", lambda: "the package flash-attn is not installed")
    values = run_config(tmp_path).model_dump()
    values["recovery"] = [{"method": "cpt", "sequences_per_step": 1}]
    values["data"] |= {"max_prompt_tokens": 256, "max_response_tokens": 256}
    notes = preflight.check(parse_config(values), tmp_path / "run")
    assert any(note.startswith("model.attention is sdpa, as the package flash-attn is not installed") for note in notes)
    values["model"]["attention"] = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"model\.attention: flash_attention_2, but the package flash-attn"):
        preflight.check(parse_config(values), tmp_path / "run")


FASTER = "{channels_per_cycle: 16, target: {tokens_per_second: 1.3}, alignment: 16, pace: fixed, channels_total: null}"


def faster(repository, *changes):
    settings = [f"schedule={FASTER}", "resources.device=cpu", *changes]
    return load_config(repository / "recipes/demo_restart_cpu.yaml", settings)


def found(gone):
    def channels_for_speed(wanted, progress, told):
        channels_for_speed.asked = wanted
        told(640 - gone, Spread(1.31, 1.30, 1.33))
        return gone

    return channels_for_speed


def test_a_speed_to_reach_is_measured_where_the_run_begins(repository, tmp_path, monkeypatch):
    measured = found(256)
    monkeypatch.setattr("ptl_rl.evaluation.speed_target.channels_for_speed", measured)
    config = faster(repository, "schedule.pace=geometric", "schedule.channels_per_cycle=0", "schedule.cuts=2")
    settled, speeds = preflight.settle(config)
    assert settled.schedule.channel_steps == [144, 112] and not settled.schedule.is_open
    (note,) = speeds.notes
    assert note.endswith("tokens_per_second: 384 of 640 channels are 1.31 times as fast (1.30-1.33)")
    speeds.save(tmp_path / "speed.json")
    assert json.loads((tmp_path / "speed.json").read_text())["widths"] == {
        "384": {"median": 1.31, "low": 1.3, "high": 1.33}
    }
    with pytest.raises(ConfigError, match=r"cannot be written .* choose another `run_dir`"):
        speeds.save(tmp_path / "not there" / "speed.json")
    guess = preflight.settled(config, preflight.check_model(config)[1]).schedule.channels_sum
    asked = measured.asked
    assert (asked.first, asked.target, asked.alignment, asked.dtype, asked.layers) == (
        640 - guess,
        1.3,
        16,
        "float32",
        0,
    )

    monkeypatch.setattr("ptl_rl.evaluation.speed_target.channels_for_speed", found(200))
    with pytest.raises(ConfigError, match="leaves 440 channels"):
        preflight.settle(faster(repository))
    monkeypatch.setattr("ptl_rl.cpu.checks.is_cpu_only", lambda: False)
    with pytest.raises(ConfigError, match=r"on cuda, but the run is for cpu; .* set schedule\.channels_total"):
        preflight.settle(config)


def test_what_cannot_be_measured_names_the_setting(repository, monkeypatch):
    for error, said in (
        (OutOfReach("no width is so fast"), r"tokens_per_second is 1\.3: no width is so fast"),
        (
            NotMeasured("vLLM could not be timed"),
            r"tokens_per_second: vLLM could not .* or set schedule\.channels_total",
        ),
    ):

        def raises(*_, error=error):
            raise error

        monkeypatch.setattr("ptl_rl.evaluation.speed_target.channels_for_speed", raises)
        with pytest.raises(ConfigError, match=said):
            preflight.settle(faster(repository))


def test_more_cuts_than_were_guessed_are_checked_once_they_are_known(repository, tmp_path, monkeypatch):
    """By FLOPs three cycles share the rows; what was measured makes nine, and too few rows for each."""
    from ptl_rl import api

    monkeypatch.setattr("ptl_rl.evaluation.speed_target.channels_for_speed", found(576))
    config = faster(
        repository, "schedule.channels_per_cycle=64", "data.train.rows=128", "schedule.target={tokens_per_second: 1.2}"
    )
    with pytest.raises(ConfigError, match="9 subsets leave 14 in a subset"):
        api.start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
