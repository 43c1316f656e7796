"""The whole system on the real stack: Ray, verl, FSDP2 and vLLM, driven by the command line as a user would."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import pytest
import torch

from ptl_rl.config.recipe import read_saved_config
from ptl_rl.driver.journal import Journal
from ptl_rl.driver.processes import end_processes
from ptl_rl.pruning.score.texts import calibration_texts
from ptl_rl.stage import StageSpec

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(torch.cuda.is_available(), reason="these runs are sized for CPUs"),
]

SMALL = {
    "data.train.rows": 96,
    "data.validation.rows": 16,
    "data.test.rows": 40,
    "calibration.sequences": 32,
    "gate.max_extensions": 0,
    "watchdog.startup_seconds": 900,  # two workers' GRPO starts in one minute on two idle cores, in five on busy ones
}
CPT = {"steps": 24, "sequences_per_step": 16, "max_tokens": 160, "save_every_steps": 8, "learning_rate": 1e-5}
GRPO = {"steps": 1, "prompts_per_step": 16, "rollouts_per_prompt": 4, "micro_batch_sequences": 32}
PATIENCE = 900
"""Seconds for a driver to come to a stage; a busy machine takes several times what an idle one does."""


def command(repository: Path, run_dir: Path, **settings) -> list[str]:
    chosen = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
    options = [part for key, value in chosen.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    recipe = str(repository / "recipes" / "demo_grpo_cpu.yaml")
    return [sys.executable, "-m", "ptl_rl.cli", "run", recipe, "--run-dir", str(run_dir), *options]


def resume_command(run_dir: Path) -> list[str]:
    return [sys.executable, "-m", "ptl_rl.cli", "resume", str(run_dir)]


def entries(run_dir: Path) -> list[str]:
    return [f"{e.cycle}.{e.stage}" for e in Journal(run_dir / "journal.jsonl").entries()]


def processes_of(run_dir: Path) -> list[str]:
    """Living processes of the run, found by the ids of all drivers that worked on it."""
    ids = {json.loads(path.read_text())["stage_id"][:32] for path in run_dir.glob("logs/*.spec.json")}
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PTL_RUN_ID") in ids and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
        except psutil.Error:
            continue
    return found


@contextmanager
def killed_in_the_end(arguments: list[str], errors: int | IO = subprocess.DEVNULL) -> Iterator[subprocess.Popen]:
    """A driver that SIGKILL ends, also when the test fails: it would go on beside the tests that follow."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def kill_in_stage(arguments: list[str], run_dir: Path, stage: str, after_seconds: float) -> None:
    """Start a driver and end it with SIGKILL once ``stage`` of some cycle has been at work for a while."""
    earlier = set(run_dir.glob(f"logs/*-{stage}.*.spec.json"))
    with killed_in_the_end(arguments) as process:
        deadline = time.monotonic() + PATIENCE
        while not set(run_dir.glob(f"logs/*-{stage}.*.spec.json")) - earlier:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(after_seconds)
        assert process.poll() is None


def interrupt_after_step(arguments: list[str], run_dir: Path, stage: str, step: int) -> None:
    """Ctrl-C once the stage's training has made so many steps; it must leave a resumable run and no process."""
    said = run_dir.with_suffix(".errors")
    with said.open("w") as errors, killed_in_the_end(arguments, errors) as process:
        deadline = time.monotonic() + PATIENCE
        while max(steps_of(run_dir, stage), default=0) < step:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert f"Continue with: ptl resume {run_dir}" in said.read_text()
    assert processes_of(run_dir) == []


def steps_of(run_dir: Path, stage: str) -> list[int]:
    """Training steps that the latest attempt at a stage has reported."""
    attempts = sorted(run_dir.glob(f"logs/{stage}.*.progress.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = attempts[-1].read_text().splitlines() if attempts else []
    return [json.loads(line)["done"] for line in lines if line.endswith("}")]


@pytest.fixture
def raising_reward(tmp_path) -> Path:
    """A file with the reward function ``my_score``, which raises on some samples and gives at most 0.25."""
    path = tmp_path / "my_reward.py"
    path.write_text(
        "def my_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    if extra_info['index'] % 8 == 3:\n"
        "        raise RuntimeError('planted')\n"
        "    return 0.25 if ground_truth in solution_str else 0.125\n"
    )
    return path


@pytest.mark.timeout(2400)
def test_run_killed_and_interrupted_is_resumed_and_completes(repository, tmp_path, raising_reward):
    run_dir = tmp_path / "run"
    start = command(
        repository,
        run_dir,
        schedule__channels_per_cycle=[],  # a block; the other run removes channels
        schedule__layers_total=1,
        calibration__source="both",
        reward__path=str(raising_reward),
        reward__name="my_score",
        gate__min_accuracy_ratio=0.01,
        recovery=[{"cpt": CPT}, {"grpo": GRPO}],
    )
    # In those that hold the most; with stages that do nothing, `test_loop_killed.py` kills it in every one.
    interrupt_after_step(start, run_dir, "001-recover", CPT["save_every_steps"] + 2)
    assert entries(run_dir) == ["0.evaluate", "1.score", "1.slice"]
    kill_in_stage(resume_command(run_dir), run_dir, "recover-part2", 15)
    finished = subprocess.run(resume_command(run_dir), capture_output=True, text=True, timeout=1200)
    assert finished.returncode == 0, finished.stderr
    expected = ["0.evaluate"] + [f"1.{stage}" for stage in ("score", "slice", "recover", "recover", "evaluate", "gate")]
    assert entries(run_dir) == expected  # each once: no finished stage ran again
    assert processes_of(run_dir) == []
    assert not [path for path in run_dir.glob("cycles/*/.*") if path.name.endswith((".tmp", ".work"))]
    assert (run_dir / "summary.png").stat().st_size > 10_000
    _, scored, sliced, cpt, grpo, *_ = (entry.metrics for entry in Journal(run_dir / "journal.jsonl").entries())
    assert 0 < grpo["reward_last"] <= 0.25
    assert "planted" in (run_dir / "logs/reward_errors.jsonl").read_text()
    # Continued pre-training went on from its own checkpoint, and its steps are counted once.
    assert steps_of(run_dir, "001-recover")[0] == CPT["save_every_steps"] + 1
    assert [row["step"] for row in cpt["curve"]] == list(range(1, CPT["steps"] + 1))
    assert (sliced["num_hidden_layers"], sliced["intermediate_size"]) == (3, 640)
    assert 0 < sliced["stream_error"] < 1
    # A cycle that starts from this model is scored on what the policy answered, too.
    assert scored["calibration_rollouts"] == 0
    config = read_saved_config(run_dir / "config.json")
    texts = calibration_texts(config, StageSpec.model_construct(source=run_dir / "best"), [])
    assert texts.rollouts == len(texts.weights) > 0 and max(texts.weights) <= 0.25
    # The gate takes no time, so being killed in it is what the disk looks like then: all but the gate's line.
    lines = (run_dir / "journal.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "journal.jsonl").write_text("".join(lines[:-1]))
    again = subprocess.run(resume_command(run_dir), capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and entries(run_dir) == expected
    assert (run_dir / "journal.jsonl").read_text().splitlines(keepends=True)[:-1] == lines[:-1]


def check_result(run_dir: Path, channels: int) -> None:
    """The final folder loads in stock transformers and vLLM in a process that never imports this project."""
    code = f"""
import os, sys
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_PLUGINS="")
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(run_dir / "best")!r})
tokenizer = AutoTokenizer.from_pretrained({str(run_dir / "best")!r})
assert model.config.intermediate_size == {channels}
prompt = tokenizer.apply_chat_template([{{"role": "user", "content": "Leo has 33 books. How many?"}}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True)
expected = model.float().generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1]:]
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    llm = LLM({str(run_dir / "best")!r}, dtype="float32", max_model_len=128, enforce_eager=True)
    ids = {{"prompt_token_ids": prompt["input_ids"][0].tolist()}}
    found = llm.generate([ids], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert list(found[0].outputs[0].token_ids) == expected.tolist(), (found, expected)
    assert not [name for name in sys.modules if name.split(".")[0] in ("ptl_rl", "reward")]
"""
    script = run_dir.parent / "load_result.py"
    script.write_text(code)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PTL_")}
    loaded = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=200)
    assert loaded.returncode == 0, loaded.stderr[-3000:]


def check_that_trained_weights_reach_vllm(path: Path, steps: int) -> None:
    """verl's workers and vLLM's replicas agree on the probability of every token, after updates, too."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [row["data"] for row in rows if "actor/grad_norm" in row["data"]]
    assert len(trained) == steps and trained[0]["actor/grad_norm"] > 0  # an update, so that there is what to compare
    for metrics in trained:
        assert metrics["training/rollout_probs_diff_max"] < 1e-4
        assert metrics["rollout_corr/log_ppl_abs_diff"] < 1e-3
        assert metrics["training/rollout_actor_probs_pearson_corr"] > 0.999


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment_of_a_shell() -> dict[str, str]:
    """What a user's shell has: nothing that ray or this project have set in the process of the tests."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PTL_", "RAY_"))}
    return {**environment, "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}


HEAD = {"RAY_USAGE_STATS_ENABLED": "0", "REPORTER_UPDATE_INTERVAL_MS": "60000"}  # a report costs most of a second


@pytest.fixture
def ray_head() -> Iterator[str]:
    """A Ray head as ``ray start`` makes it; gives the address that jobs are submitted to."""
    tag, dashboard = uuid.uuid4().hex, free_port()
    # A folder of its own, with a short name for the sake of sockets: in the default one Ray leaves word of this head,
    # and every later `ray.init` on the machine would look for it.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    start = f"start --head --port={free_port()} --dashboard-host=127.0.0.1 --dashboard-port={dashboard}"
    # Any other Ray of the machine has the default port of the agent that starts jobs, and without one none starts.
    start += " --dashboard-agent-listen-port=0"
    subprocess.run(
        [
            str(Path(sys.executable).with_name("ray")),
            *start.split(),
            f"--temp-dir={folder}",
            "--num-gpus=3",  # two workers, and the parent of a distillation
            "--num-cpus=20",  # what the SFT trainer reserves for two workers, and no more
        ],
        env={**environment_of_a_shell(), **HEAD, "PTL_TEST_HEAD": tag},
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        end_processes("PTL_TEST_HEAD", tag, grace_seconds=0)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(1100)
def test_submitted_job_with_two_workers_a_parent_and_an_own_reward(repository, tmp_path, ray_head, raising_reward):
    run_dir = tmp_path / "run"
    # The unpruned parent teaches: its vLLM server takes a worker of its own. Two steps so large that rollouts with the
    # weights of the step before would differ visibly, and verl's own log-probabilities to compare vLLM's with.
    distill = {"steps": 2, "learning_rate": 1e-3, "prompts_per_step": 16, "micro_batch_sequences": 16}
    distill |= {"rewards": True, "rollouts_per_prompt": 4}
    distill |= {"verl": {"algorithm.rollout_correction.bypass_mode": False}}
    options = command(
        repository,
        run_dir,
        schedule__channels_per_cycle=[128],
        data__train__rows=16,
        resources__workers_per_node=2,
        reward__path=str(raising_reward),
        reward__name="my_score",
        recovery=[
            {"cpt": {"steps": 2, "sequences_per_step": 8, "max_tokens": 160, "parent_kl": 0.5}},
            {"distill": distill},
        ],
    )[4:]
    submitted = submit(repository, ray_head, options)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "cycle 1 evaluate: accuracy" in submitted.stdout  # the job's log is followed
    assert f"final model: {run_dir}" in submitted.stdout
    assert entries(run_dir)[0] == "0.evaluate"
    in_cycle = [e for e in Journal(run_dir / "journal.jsonl").entries() if e.cycle == 1]
    assert [e.stage for e in in_cycle] == ["score", "slice", "recover", "recover", "evaluate", "gate"]
    recoveries = [e for e in in_cycle if e.stage == "recover"]
    artefacts = [f"cycles/001/recovered{part}" for part in ("", "-part2")]
    methods = [(e.metrics["method"], e.artefact) for e in recoveries]
    assert methods == list(zip(("cpt", "distill"), artefacts, strict=True))
    cpt, distilled = (e.metrics for e in recoveries)
    assert [set(row) >= {"loss", "parent_kl", "tokens"} for row in cpt["curve"]] == [True, True]
    assert distilled["curve"][-1]["distillation_loss"] > 0
    assert 0 < distilled["reward_last"] <= 0.25
    check_that_trained_weights_reach_vllm(run_dir / artefacts[-1] / "verl_metrics.jsonl", steps=2)
    assert (run_dir / "best").resolve() == run_dir / artefacts[-1]
    sliced = next(e.metrics for e in in_cycle if e.stage == "slice")
    assert sliced["logit_difference"] < 1e-4
    assert 0 < sliced["output_error"] < sliced["output_error_plain"]
    for folder in ("sliced", "recovered", "recovered-part2"):  # each worker has written its part
        assert len(list((run_dir / "cycles/001" / folder).glob("model-*.safetensors"))) == 2
    assert "planted" in (run_dir / "logs/reward_errors.jsonl").read_text()
    assert "the reward function raised on some samples" in submitted.stdout and "planted" in submitted.stdout
    assert processes_of(run_dir) == []
    check_result(run_dir, channels=512)


def submit(repository: Path, address: str, options: list[str]) -> subprocess.CompletedProcess:
    """``launch/submit.sh`` with a run's options, once the head takes jobs."""
    for _ in range(20):
        submitted = subprocess.run(
            ["bash", str(repository / "launch/submit.sh"), *options],
            env={**environment_of_a_shell(), "RAY_API_SERVER_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=1000,
        )
        if "No available agent" not in submitted.stderr:  # the head's job agent starts a little after the head
            break
        time.sleep(2)
    return submitted
