"""Bad input ends with one clear line and exit status 2, before Ray starts.

Of the cases three are given to the command in a process of its own, one for each depth of its checks.
"""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ptl_rl.cli import app


def run(arguments):
    """Status and what it says on stderr, of a process of its own."""
    command = [sys.executable, "-m", "ptl_rl.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return result.returncode, result.stderr


def run_here(arguments, capfd):
    """The same in this process, with what processes say that the command starts."""
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stderr + capfd.readouterr().err


def test_a_recipe_for_gpus_without_any_is_refused_before_anything_is_downloaded(repository, tmp_path):
    recipe = str(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml")
    command = [sys.executable, "-m", "ptl_rl.cli", "run", recipe, "--run-dir", str(tmp_path / "run")]
    hidden = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=hidden)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: resources.device: cuda, but ") and "Qwen" not in line
    assert not (tmp_path / "run").exists()


CASES = [
    (["recovery.stpes=3"], "recovery.stpes: unknown key; did you mean 'steps'?"),
    (["model.path=/no/such/model"], "model.path: /no/such/model is not a folder"),
    (["schedule.channels_per_cycle=[400,400]"], "removes 800 channels per layer, but intermediate_size is 640"),
    (["schedule.layers_total=4"], "layers_total is 4, but num_hidden_layers is 4"),
    (
        ["schedule.layers_total=1", "criterion.layers=explicit", "criterion.layer_ids=[4]"],
        "criterion.layer_ids: 4, but the model's 4 blocks are 0..3",
    ),
    (
        ["criterion.path=CRITERION", "criterion.channels=mine"],
        "mine reads gradients of its own; set calibration.token",
    ),
    (["criterion.path=REWARD", "criterion.channels=mine"], "my_reward.py has no function mine"),
    (["data.train.path=BAD"], "bad.jsonl:2: not valid JSON"),
    (["data.train.rows=32"], "leave 16 in a subset, but recovery.prompts_per_step is 32"),
    (["reward.path=REWARD", "reward.name=scroe"], "scroe"),
    (["reward.path=/no/reward.py"], "/no/reward.py"),
]
OWN_PROCESS = ("recovery.stpes: unknown key", "mine reads gradients of its own", "scroe")


@pytest.mark.parametrize(("settings", "message"), CASES)
def test_one_line_and_status_2(settings, message, repository, tmp_path, capfd):
    row = {"question": "1 + 1?", "solution": "2", "answer": "2"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + '\n{"question": \n')
    function = "def score(data_source, solution_str, ground_truth, extra_info=None): return 1.0"
    (tmp_path / "my_reward.py").write_text(function)
    (tmp_path / "my_criterion.py").write_text(
        "from ptl_rl.pruning.criteria import reads\n\n\n@reads(gradients=True)\n"
        "def mine(statistics):\n    return statistics.gradient_sum_LC\n"
    )
    for word, name in (("BAD", "bad.jsonl"), ("REWARD", "my_reward.py"), ("CRITERION", "my_criterion.py")):
        settings = [setting.replace(word, str(tmp_path / name)) for setting in settings]
    recipe = str(repository / "recipes/demo_restart_cpu.yaml")
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ["run", recipe, "--run-dir", str(tmp_path / "run"), *options]
    own_process = message.startswith(OWN_PROCESS)
    status, errors = run(arguments) if own_process else run_here(arguments, capfd)
    assert status == 2, errors
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], errors
    assert not (tmp_path / "run").exists()
