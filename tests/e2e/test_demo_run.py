"""The whole system on the real stack: Ray, verl, FSDP2 and vLLM, driven by the command line as a user would."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from real_runs import entries, processes_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl_rl.data.encoding import encode_sequences
from ptl_rl.driver.journal import Journal
from ptl_rl.driver.processes import end_processes
from ptl_rl.families import FAMILIES
from ptl_rl.pruning.live import LiveModel, cut_live
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.texts import texts_of
from ptl_rl.stage import AFTER_CUT, load_context

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


def options_of(repository: Path, run_dir: Path, **settings) -> list[str]:
    """Of a run: the demo's recipe, its folder, settings."""
    chosen = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
    options = [part for key, value in chosen.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return [str(repository / "recipes" / "demo_grpo_cpu.yaml"), "--run-dir", str(run_dir), *options]


RATE = 3e-4
"""So large that rollouts with the weights of the step before would differ visibly."""
GOVERNED = {"max_damage": [0.1, 100.0], "recovered": 0.01, "validate_every": 1}
"""The first cut is as large as that allows, the second takes the rest."""

CRITERION = """
def mine(statistics):
    return statistics.abs_sum_LC
"""


def check_result(run_dir: Path, channels: int) -> None:
    """The final folder is a whole model of stock transformers, which answers as vLLM did in the evaluation."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        run_dir / "best", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.config.intermediate_size == channels and type(model).__module__.startswith("transformers.models.qwen2")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "best")
    samples = pyarrow.parquet.read_table(run_dir / "cycles/001/evaluation/samples.parquet").to_pylist()
    for sample in samples[:4]:
        chat = [{"role": "user", "content": sample["question"]}]
        read = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**read, max_new_tokens=112, do_sample=False)[0, read["input_ids"].shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) == sample["text"]


def check_that_trained_weights_reach_vllm(path: Path, steps: int) -> None:
    """verl's workers and vLLM's replicas agree on the probability of every token, after updates, too."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [row["data"] for row in rows if "actor/grad_norm" in row["data"]]
    assert [metrics["actor/lr"] for metrics in trained] == pytest.approx([RATE] * steps)
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
            "--num-cpus=12",  # what verl reserves for them, and no more
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
def test_submitted_job_governed_with_two_workers_a_parent_and_an_own_reward(
    repository, tmp_path, ray_head, raising_reward
):
    """Two cuts in one training that finds its pace; what `restart` mode does is seen in first light."""
    run_dir = tmp_path / "run"
    # The unpruned parent teaches: its vLLM server takes a worker of its own. Two steps, and verl's own
    # log-probabilities to compare vLLM's with.
    distill = {"steps": 2, "learning_rate": RATE, "prompts_per_step": 16, "micro_batch_sequences": 16}
    distill |= {"rewards": True, "rollouts_per_prompt": 4, "validate_before": False}
    distill |= {"verl": {"algorithm.rollout_correction.bypass_mode": False}}
    (tmp_path / "mine.py").write_text(CRITERION)
    options = options_of(
        repository,
        run_dir,
        calibration__source="both",
        **{f"schedule__{name}": value for name, value in GOVERNED.items()},
        data__train__rows=32,
        resources__workers_per_node=2,
        criterion__path=str(tmp_path / "mine.py"),
        criterion__channels="mine",
        reward__path=str(raising_reward),
        reward__name="my_score",
        recovery=[{"distill": distill}],
    )
    submitted = submit(repository, ray_head, options)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "cycle 1 evaluate: accuracy" in submitted.stdout  # the job's log is followed
    assert f"final model: {run_dir}" in submitted.stdout
    assert entries(run_dir) == ["0.evaluate", "1.cut", "1.cut", "1.recover", "1.evaluate", "1.gate"]
    journal = Journal(run_dir / "journal.jsonl").entries()
    cuts = [entry.metrics for entry in journal if entry.stage == "cut"]
    found = check_cuts(cuts)
    recover = next(entry.metrics for entry in journal if entry.stage == "recover")
    assert [(row["step"], row["intermediate_size"]) for row in recover["curve"]] == [(1, found), (2, 256)]
    damage = [cut["loss_after"] - cut["loss_before"] for cut in cuts]
    assert [row["damage"] for row in recover["curve"]] == pytest.approx(damage)
    assert recover["curve"][-1]["distillation_loss"] > 0
    assert all(0 <= row["learnable_fraction"] <= 1 for row in recover["curve"])
    assert 0 < recover["reward_last"] <= 0.25
    assert "the steps are spent; the target, of step 2, with" in recover["notes"][0]
    assert recover["logit_difference"] < 1e-4  # of the sliced model, from the policy with its zeros
    recovered = run_dir / "cycles/001/recovered"
    check_that_trained_weights_reach_vllm(recovered / "verl_metrics.jsonl", steps=2)
    check_plans(run_dir)
    check_as_cut(journal[-2].metrics, recovered)
    assert (run_dir / "best").resolve() == recovered
    assert len(list(recovered.glob("model-*.safetensors"))) == 2  # each worker has written its part
    assert "planted" in (run_dir / "logs/reward_errors.jsonl").read_text()
    assert "the reward function raised on some samples" in submitted.stdout and "planted" in submitted.stdout
    assert processes_of(run_dir) == [] and list(run_dir.glob("cycles/*/.*")) == []
    check_result(run_dir, channels=256)


def check_cuts(cuts: list[dict]) -> int:
    """Of what was found with each; gives the width that the first has left."""
    first, last = cuts
    assert (first["after_step"], last["after_step"]) == (0, 1)
    assert 256 < first["intermediate_size"] < 640 and last["intermediate_size"] == 256
    assert 0 < first["loss_after"] - first["loss_before"] <= GOVERNED["max_damage"][0]
    tried = {width: loss - first["loss_before"] for width, loss in first["tried"]}
    assert min(tried) == 256 and tried[256] > GOVERNED["max_damage"][0], "all at once would have been too much"
    assert [cut["calibration_rollouts"] > 0 for cut in cuts] == [False, True]  # there are none before the first step
    assert all(0 < cut["output_error"] < cut["output_error_plain"] for cut in cuts)
    return first["intermediate_size"]


def check_as_cut(evaluated: dict, recovered: Path) -> None:
    """The model right after the last cut is a model of the final shapes, judged on the same problems."""
    difference = evaluated["accuracy"] - evaluated["after_cut"]["accuracy"]
    assert evaluated["recovered"]["difference"] == pytest.approx(difference)
    of_both = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (recovered, recovered / AFTER_CUT)
    ]
    trained, as_cut = (dict(model.named_parameters()) for model in of_both)
    assert {name: p.shape for name, p in as_cut.items()} == {name: p.shape for name, p in trained.items()}
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(as_cut[name], trained[name])
    assert torch.allclose(as_cut[name], trained[name], atol=0.01)  # two steps apart


def check_plans(run_dir: Path) -> None:
    """Two workers have cut what one does, and the cuts, one on the other, are what the finished model was sliced by."""
    first, second = (PruningPlan.load(run_dir / f"cycles/001/cuts/{number}/plan.json") for number in ("001", "002"))
    whole = PruningPlan.load(run_dir / "cycles/001/recovered/plan.json")
    assert first.keep_channels == first_plan_by_one_worker(run_dir).keep_channels
    for block, kept in enumerate(whole.keep_channels):
        assert kept == [first.keep_channels[block][channel] for channel in second.keep_channels[block]]


def first_plan_by_one_worker(run_dir: Path) -> PruningPlan:
    """The first cut once more, in this process, of the model that the run began with."""
    context = load_context(run_dir / "logs/001-recover.1.spec.json")
    config, source = context.config, context.spec.source
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    records = context.data.worked_solutions()[: config.calibration.sequences]
    texts = texts_of(records, config.prompt_suffix)
    read = encode_sequences(tokenizer, texts.questions, texts.solutions, config.calibration.max_tokens, texts.weights)
    live = LiveModel(model, FAMILIES["qwen2"], source, torch.device("cpu"), 32, 0, config.calibration.prompt_weight)
    options = {"remove_channels": config.schedule.channels_sum, "alignment": 16, "sensitivity": True}
    options |= {"max_damage": config.schedule.damages[0]}
    return cut_live(live, None, config.criterion, read, [], **options).plan


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
