from pathlib import Path

import pytest


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
