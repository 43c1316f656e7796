"""Stock verl GRPO on CPUs: two FSDP2 workers, two vLLM replicas, and weights that really arrive.

A rollout which kept its first weights would still produce tokens and rewards, so the test compares
the probabilities that vLLM reports with those of the trained policy after an update.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ptl_rl.driver.processes import end_processes, remove_orphaned_segments, tagged_processes
from ptl_rl.platform import checks

pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU platform stays inert here"),
]

TAG = "PTL_TEST_RUN"
WORKERS = 2
STEPS = 2
RUN_TIMEOUT_SECONDS = 240
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return sum(character < "a" for character in solution_str) / max(1, len(solution_str))
"""


def write_prompts(path: Path, rows: int) -> None:
    records = [
        {
            "data_source": "test/add",
            "prompt": [{"role": "user", "content": f"{i} + {i} ="}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"index": i},
        }
        for i in range(rows)
    ]
    pq.write_table(pa.Table.from_pylist(records), path)


def grpo_settings(folder: Path, checkpoint: Path) -> dict[str, object]:
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return {
        **checks.verl_cpu_overrides(WORKERS),
        "algorithm.adv_estimator": "grpo",
        "trainer.logger": "[file]",
        "trainer.total_training_steps": STEPS,
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.resume_mode": "disable",
        "trainer.default_local_dir": folder / "checkpoints",
        "data.train_files": folder / "prompts.parquet",
        "data.val_files": folder / "prompts.parquet",
        "data.train_batch_size": 4,
        "data.max_prompt_length": 64,
        "data.max_response_length": 16,
        "actor_rollout_ref.model.path": checkpoint,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        # Large on purpose: rollouts with the weights of the step before must differ visibly.
        f"{actor}.optim.lr": 0.01,
        f"{actor}.ppo_mini_batch_size": 4,
        f"{actor}.ppo_micro_batch_size_per_gpu": 8,
        f"{actor}.use_kl_loss": False,
        f"{rollout}.n": 4,
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": 8,
        "reward.custom_reward_function.path": folder / "reward.py",
        "ray_kwargs.ray_init.num_gpus": WORKERS,
        "ray_kwargs.ray_init.num_cpus": checks.logical_cpus(WORKERS),
        "ray_kwargs.ray_init.include_dashboard": False,
    }


def run_grpo(folder: Path, checkpoint: Path, tag: str) -> tuple[int, str]:
    """(exit status, end of the output) of one verl run in processes of its own."""
    settings = [f"++{key}={value}" for key, value in grpo_settings(folder, checkpoint).items()]
    env = {**os.environ, **checks.cpu_env_vars(WORKERS), TAG: tag}
    env["VERL_FILE_LOGGER_PATH"] = str(folder / "metrics.jsonl")
    env.pop("RAY_ADDRESS", None)
    log = folder / "verl.log"
    with log.open("wb") as output:
        status = subprocess.run(
            [sys.executable, "-m", "verl.trainer.main_ppo", *settings],
            cwd=folder,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=RUN_TIMEOUT_SECONDS,
        ).returncode
    return status, log.read_text(errors="replace")[-4000:]


def test_grpo_on_two_workers(tmp_path, make_checkpoint, tokenizer):
    # verl masks ids beyond the tokenizer in rollouts only: padding would shift the probabilities.
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    checkpoint = make_checkpoint("qwen2", vocab_size=len(tokenizer), **sizes)
    write_prompts(tmp_path / "prompts.parquet", rows=8)
    (tmp_path / "reward.py").write_text(REWARD)
    tag, started = uuid.uuid4().hex, time.time()
    try:
        status, output = run_grpo(tmp_path, checkpoint, tag)
        assert status == 0, output
        assert_nothing_left(tag)
    finally:
        end_processes(TAG, tag, grace_seconds=0)
        remove_orphaned_segments(started)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["data"]["actor/grad_norm"] > 0, "no update, hence nothing to compare"
    for line in lines:
        assert line["data"]["training/rollout_probs_diff_max"] < 1e-4
        assert line["data"]["rollout_corr/log_ppl_abs_diff"] < 1e-3
        assert line["data"]["training/rollout_actor_probs_pearson_corr"] > 0.999


def assert_nothing_left(tag: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while (left := tagged_processes(TAG, tag)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left, [" ".join(process.cmdline())[:200] for process in left]
