"""First light's own logic, with made-up stages and commands: ``tests/e2e/test_first_light.py`` runs the real ones."""

import json
import shutil
import signal
import time
from pathlib import Path

import gpu_first_light
import light_runs
import psutil
import pytest
import typer
from gpu_first_light import FirstLight, visible_gpus
from light_runner import Commands, Lines, Sampler, Stage, StageFailed, StageSkipped, python, run_stages, verdict
from typer.testing import CliRunner

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.driver.preflight import check
from ptl_rl.recovery.sft_config import compose_sft, render_sft
from ptl_rl.recovery.verl_config import compose, render
from ptl_rl.stage import StageSpec
from ptl_rl.testbed import CHECKPOINT_DIR

LLAMA = CHECKPOINT_DIR.with_name("llama")


class Clock:
    """Stands still but where a stage takes time."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Ran(list):
    """Stages that note that they ran, and with how many seconds."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()

    def stage(self, name: str, needs: float = 10, takes: float = 10, most: float = 1e9, error=None) -> Stage:
        def run(seconds: float):
            self.append((name, seconds))
            self.clock.now += takes
            if error is not None:
                raise error
            return {"figure": len(self)}

        return Stage(name, needs, run, most)


def test_a_stage_for_which_too_little_time_is_left_is_skipped_and_a_later_shorter_one_is_not(tmp_path):
    ran, lines = Ran(), Lines(tmp_path / "lines.jsonl")
    stages = [ran.stage("a", takes=70, most=80), ran.stage("b", needs=31), ran.stage("c", needs=30)]
    found = run_stages(stages, lines, seconds=100, clock=ran.clock)
    assert ran == [("a", 80), ("c", 30)]
    assert [line["ok"] for line in found] == [True, None, True]
    assert found[1]["skipped"] == "30 s left, needs about 31"
    assert found[0] == {"stage": "a", "ok": True, "seconds": 70.0, "figure": 1}
    assert [json.loads(text) for text in lines.path.read_text().splitlines()] == found
    assert "skipped: 30 s left" in verdict(found[1])


def test_a_stage_that_fails_is_recorded_with_the_end_of_its_log_and_the_others_run(tmp_path):
    log = tmp_path / "stage.log"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    ran = Ran()
    failed = StageFailed("exit status 1", log, {"accuracy": [0.9]})
    stages = [ran.stage("a", error=failed), ran.stage("b", error=ValueError("a bug")), ran.stage("c")]
    first, second, third = run_stages(stages, Lines(tmp_path / "lines.jsonl"), seconds=100, clock=ran.clock)
    assert first["ok"] is False and first["error"] == "exit status 1" and first["accuracy"] == [0.9]
    assert first["tail"].splitlines() == [f"line {number}" for number in range(40, 100)]
    assert second["ok"] is False and second["error"] == "ValueError: a bug"
    assert "raise error" in second["tail"]
    assert third["ok"] is True
    assert "FAILED" in verdict(first)


def test_the_command_line_says_what_failed_by_its_status_and_goes_on_with_it(tmp_path, monkeypatch):
    ran, lines = Ran(), tmp_path / "lines.jsonl"
    stages = [ran.stage("imports"), ran.stage("grpo", error=StageFailed("exit status 1", None))]
    monkeypatch.setattr(FirstLight, "stages", lambda light: stages)
    app = typer.Typer()
    app.command()(gpu_first_light.main)

    def status(*options):
        arguments = ["--minutes", "5", "--device", "cpu", "--out", str(lines), *options]
        return CliRunner().invoke(app, arguments).exit_code

    assert status() == 1 and [name for name, _ in ran] == ["imports", "grpo"]
    stages[1] = ran.stage("grpo")
    assert status("--resume") == 0 and [name for name, _ in ran[2:]] == ["grpo"]
    assert status("--only", "imports") == 0 and [name for name, _ in ran[3:]] == ["imports"]
    assert status("--only", "gpro") == 2 and len(ran) == 4


def test_what_a_machine_cannot_run_is_skipped_not_failed(tmp_path):
    ran = Ran()
    stages = [ran.stage("a", error=StageSkipped("needs two GPUs"))]
    (line,) = run_stages(stages, Lines(tmp_path / "lines.jsonl"), seconds=100, clock=ran.clock)
    assert line["ok"] is None and line["skipped"] == "needs two GPUs"


def test_resuming_runs_only_what_is_not_ok(tmp_path):
    lines = Lines(tmp_path / "lines.jsonl")
    for name, ok in (("a", False), ("a", True), ("b", True), ("b", False), ("c", None)):
        lines.add({"stage": name, "ok": ok, "seconds": 1.0, "skipped": "no time", "error": "none"})
    with lines.path.open("a") as file:
        file.write('{"stage": "d", "ok": tr')  # cut short when the machine was taken away
    ran = Ran()
    stages = [ran.stage(name) for name in "abcd"]
    found = run_stages(stages, lines, seconds=100, resume=True, clock=ran.clock)
    assert [name for name, _ in ran] == ["b", "c", "d"]
    assert [line["ok"] for line in found] == [True] * 4
    assert [lines.latest()[name]["ok"] for name in "abcd"] == [True] * 4  # though they follow a line without an end
    again = Ran()
    run_stages([again.stage("a")], lines, seconds=100, clock=again.clock)
    assert again  # without resume everything runs


def test_an_interrupted_stage_leaves_its_line_and_ends_the_rest(tmp_path):
    ran, lines = Ran(), Lines(tmp_path / "lines.jsonl")
    run_stages([ran.stage("a", error=KeyboardInterrupt()), ran.stage("b")], lines, seconds=100, clock=ran.clock)
    assert [name for name, _ in ran] == ["a"]
    assert lines.latest()["a"]["ok"] is False and "KeyboardInterrupt" in lines.latest()["a"]["error"]


def test_memory_is_the_peak_of_the_stage(tmp_path):
    seen = iter([(3.0, 10.0), (7.5, 90.0), (2.0, 20.0), None])
    sampler = Sampler(lambda: next(seen, None), every_seconds=0.001)
    assert sampler.take() == {}
    sampler.start()
    while next(iter(sampler._seen), None) is None or len(sampler._seen) < 3:
        time.sleep(0.001)
    sampler.end()
    sampler.join()
    assert sampler.take() == {"memory_peak_gib": 7.5, "busy_percent": 40}
    assert sampler.take() == {}


HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(600)
"""


def test_a_command_that_hangs_is_ended_with_everything_that_it_started(tmp_path, capsys):
    log = tmp_path / "hangs.log"
    with pytest.raises(StageFailed, match="ended after 3 s") as failure:
        Commands().call(python("-c", HANGS), log, 3)
    assert failure.value.log == log
    child = int(log.read_text().split()[1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert f"child {child}" in capsys.readouterr().out
    assert "time.sleep(600)" in log.with_suffix(".stacks").read_text()


def test_a_command_runs_this_checkout_offline_and_its_status_counts(tmp_path):
    code = "import os, ptl_rl; print(ptl_rl.__file__, os.environ['HF_HUB_OFFLINE']); raise SystemExit(3)"
    with pytest.raises(StageFailed, match="exit status 3"):
        Commands().call(python("-c", code), tmp_path / "log", 60)
    assert (
        tmp_path / "log"
    ).read_text() == f"{gpu_first_light.light_probe.Path(__file__).parents[2]}/ptl_rl/__init__.py 1\n"


class Faked(Commands):
    """Notes the commands of a run in place of running them."""

    def __init__(self, does=lambda arguments: None) -> None:
        super().__init__()
        self.does, self.called = does, []

    def call(self, arguments, log, seconds):
        self.called.append([str(argument) for argument in arguments])
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        try:
            self.does(self.called[-1])
        except StageFailed as error:
            log.write_text("run folder: x\nerror: stage 001-score failed\n  continue with: ptl resume x\n")
            raise StageFailed(str(error), log) from None


def evaluated(accuracy: float, cycle: int = 0) -> Entry:
    metrics = {"accuracy": accuracy, "parameters": 100 - cycle, "tokens_per_second": 10.4}
    return Entry(cycle=cycle, stage="evaluate", seconds=2.04, metrics=metrics)


def begin(arguments, *entries: Entry) -> Path:
    """What ``ptl run`` leaves."""
    folder = Path(arguments[arguments.index("--run-dir") + 1] if "run" in arguments else arguments[-1])
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").touch()
    for entry in entries:
        Journal(folder / "journal.jsonl").append(entry)
    return folder


def test_a_run_goes_on_where_its_settings_are_the_same(tmp_path):
    def fails(arguments):
        folder = begin(arguments, evaluated(0.9))
        (folder / "logs/000-evaluate.1.log").write_text("fine")
        time.sleep(0.01)
        (folder / "logs/001-score.1.log").write_text("planted")
        raise StageFailed("exit status 1")

    recipe, settings = light_runs.cpt("cpu")
    light = FirstLight(tmp_path, "cpu", commands=Faked(fails))
    with pytest.raises(StageFailed) as failure:
        light.run("cpt", recipe, settings, 10)
    assert failure.value.log.name == "001-score.1.log"
    assert failure.value.found["accuracy"] == [0.9]
    assert "exit status 1" in str(failure.value) and "stage 001-score failed" in str(failure.value)

    later = FirstLight(tmp_path, "cpu", commands=Faked(lambda arguments: begin(arguments, evaluated(0.8, 1))))
    folder, entries = later.run("cpt", recipe, settings, 10)
    assert later.commands.called[0][3:] == ["resume", str(folder)]
    assert [entry.metrics["accuracy"] for entry in entries] == [0.9, 0.8]
    later.run("cpt", recipe, settings, 10)
    assert len(later.commands.called) == 1  # a finished run is not looked at twice

    other = FirstLight(tmp_path, "cpu", settings=["seed=1"], commands=Faked(begin))
    other_folder, _ = other.run("cpt", recipe, settings, 10)
    assert other_folder != folder and "run" in other.commands.called[0] and "--set=seed=1" in other.commands.called[0]


def test_a_run_without_the_recovery_that_was_to_be_seen_has_failed(tmp_path):
    light = FirstLight(tmp_path, "cpu", commands=Faked(lambda arguments: begin(arguments, evaluated(0.9))))
    with pytest.raises(StageFailed, match="no recovery by cpt in its journal"):
        light.cpt(10)


def test_a_probe_that_hangs_names_its_check(tmp_path):
    def hangs(arguments):
        report = {"machine": {"cores": 2}, "problems": ["import vllm: gone"], "running": "ipc"}
        Path(arguments[2]).write_text(json.dumps(report))
        raise StageFailed("ended after 120 s")

    light = FirstLight(tmp_path, "cuda", commands=Faked(hangs))
    with pytest.raises(StageFailed) as failure:
        light.imports(120)
    assert str(failure.value) == "import vllm: gone; ended after 120 s; ipc: did not end"
    assert failure.value.found["report"]["machine"] == {"cores": 2}


def test_distillation_wants_two_gpus(tmp_path, monkeypatch):
    light = FirstLight(tmp_path, "cuda", commands=Faked())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert visible_gpus() == 1
    with pytest.raises(StageSkipped, match="needs two GPUs"):
        light.distill(10)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == 2
    assert light.commands.called == []


def runs_on_gpus(folder: Path) -> dict[str, light_runs.Run]:
    """Everything that ``run`` is asked for there."""
    data = folder / "gsm8k.jsonl"
    rows = [{"question": f"What is {n} + 1, and why?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(120)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = shutil.copytree(LLAMA, folder / "model")
    values = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 2048}  # as real ones read
    (model / "config.json").write_text(json.dumps(values))
    real = FirstLight(folder, "cuda", model=str(model), data=str(data))._real_run()
    return {
        "grpo": light_runs.grpo("cuda"),
        "cpt": light_runs.cpt("cuda"),
        "distill": light_runs.distill("cuda"),
        "real": real,
    }


@pytest.mark.parametrize("name", ["grpo", "cpt", "distill", "real"])
def test_what_is_run_on_gpus_passes_every_check_before_the_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:1")  # so that no GPU is looked for on this machine
    recipe, settings = runs_on_gpus(tmp_path)[name]
    config = load_config(recipe, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    assert config.resources.device == "cuda" and config.model.dtype == "bfloat16"
    check(config, tmp_path / "run")
    for part, recovery in enumerate(config.recovery):
        told = StageSpec.model_construct(
            name="recover",
            device="cuda",
            attention="sdpa",
            cycle=1,
            round=0,
            planned=0,
            part=part,
            steps=2,
            **dict.fromkeys(("source", "parent", "work", "progress"), LLAMA),
        )
        if recovery.method == "cpt":
            compose_sft(render_sft(config, recovery, told, tmp_path / "sequences", 32))
        else:
            eager = compose(render(config, told)).actor_rollout_ref.rollout.enforce_eager
            assert eager is (name != "real")
    if name == "distill":
        one = [f"{key}={json.dumps(value)}" for key, value in {**settings, "resources.workers_per_node": 1}.items()]
        with pytest.raises(ConfigError, match="leaves none of 1 workers_per_node to train"):
            load_config(recipe, one)


def test_a_real_model_loses_an_eighth_twice_and_is_judged_by_what_it_has_not_seen(tmp_path):
    recipe, _ = runs_on_gpus(tmp_path)["real"]
    config = load_config(recipe)
    assert config.schedule.channels_per_cycle == [96, 96] and config.schedule.alignment == 32
    assert config.data.test.layout == "openai/gsm8k"
    learnt, judged = (
        set(Path(path).read_text().splitlines()) for path in (tmp_path / "train.jsonl", tmp_path / "test.jsonl")
    )
    assert (len(learnt), len(judged)) == (96, 24) and not learnt & judged
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"question": "Why?", "solution": "So.", "answer": "1"}) + "\n")
    assert light_runs.questions(str(own), str(own), tmp_path) == ({"path": str(own), "rows": 1},) * 2


def test_a_summary_holds_what_a_run_cost(tmp_path):
    curve = [
        {"step": 0, "validation_accuracy": 0.5},
        {"step": 1, "reward": 0.2},
        {"step": 2, "reward": 0.4, "tokens_per_second": 9.0},
    ]
    metrics = {"method": "grpo", "steps": 2, "validation_accuracy_before": 0.5, "curve": curve}
    folder = tmp_path / "cycles/001/recovered"
    folder.mkdir(parents=True)
    logged = [{"step": 1, "data": {"perf/max_memory_allocated_gb": 1.0}}]
    logged += [{"step": 2, "data": {"perf/max_memory_allocated_gb": 2.0, "training/rollout_probs_diff_max": 0.01}}]
    (folder / "verl_metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    entries = [
        evaluated(0.9),
        Entry(cycle=1, stage="score", seconds=3.0, metrics={"peak_memory_gib": 0.5}),
        Entry(cycle=1, stage="slice", seconds=4.0, metrics={"logit_difference": 1e-6, "peak_memory_gib": 0.7}),
        Entry(cycle=1, stage="recover", seconds=50.0, artefact="cycles/001/recovered", metrics=metrics),
        Entry(cycle=1, stage="gate", metrics={"decision": "accept"}),
    ]
    found = light_runs.summary(tmp_path, entries)
    assert found["stage_seconds"] == [["0.evaluate", 2.0], ["1.score", 3.0], ["1.slice", 4.0], ["1.recover", 50.0]]
    assert found["worker_memory_peak_gib"] == {"1.score": 0.5, "1.slice": 0.7}
    assert found["logit_difference"] == [1e-6] and found["answer_tokens_per_second"] == [10]
    assert found["recoveries"] == [
        {
            "method": "grpo",
            "steps": 2,
            "validation_accuracy_before": 0.5,
            "reward": [0.2, 0.4],
            "tokens_per_second": 9.0,
            "memory_allocated_gib": 2.0,
            "rollout_probs_diff_max": 0.01,
        }
    ]


def test_stages_come_in_order_of_value_and_a_hung_one_leaves_time():
    stages = FirstLight(Path("x")).stages()
    assert [stage.name for stage in stages] == ["imports", "vllm", "grpo", "cpt", "real", "distill"]
    assert all(stage.most_seconds == 2 * stage.needs_seconds for stage in stages)
    assert signal.getsignal(signal.SIGTERM) != gpu_first_light.interrupt  # importing installs no handler
