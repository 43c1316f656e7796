"""The check before a run: one clear sentence for each way in which a reward file can be wrong."""

import subprocess
import sys
import textwrap

import pytest

from reward.check import RewardError, check_reward_function, reward_keys

SAMPLE = {
    "data_source": "math12k",
    "solution_str": r"\boxed{4}",
    "ground_truth": "4",
    "extra_info": {"index": 0},
}
SIGNATURE = "data_source, solution_str, ground_truth, extra_info=None"


@pytest.fixture
def write(tmp_path):
    def write(source: str):
        path = tmp_path / "my_reward.py"
        path.write_text(textwrap.dedent(source))
        return path

    return write


@pytest.mark.parametrize(
    ("body", "keys"),
    [
        (f"def compute_score({SIGNATURE}): return float(ground_truth in solution_str)", {"acc": "number"}),
        (f"async def compute_score({SIGNATURE}): return 1", {"acc": "number"}),
        (
            "def compute_score(**kwargs): return {'score': 1, 'pred': '4', 'n': 3}",
            {"pred": "text", "n": "number"},
        ),
        (f"class F:\n    def __call__(self, {SIGNATURE}): return 1\ncompute_score = F()", {"acc": "number"}),
    ],
)
def test_a_good_function_passes_and_tells_its_keys(write, body, keys):
    path = write(body)
    assert check_reward_function(path, "compute_score", SAMPLE) is None
    assert reward_keys(str(path), "compute_score", SAMPLE) == keys


def test_dataclasses_with_postponed_annotations_work(write):
    path = write(f"""
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Weights:
            accuracy: float = 1.0
        def compute_score({SIGNATURE}):
            return Weights().accuracy
    """)
    check_reward_function(path, "compute_score", SAMPLE)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", r"has a syntax error in line 1: "),
        (
            "x = 1\nimport no_such_package_at_all\n",
            r"failed at line 2 with ModuleNotFoundError: .*; install it",
        ),
        ("def g():\n    return 1 / 0\ng()\n", r"failed at line 2 with ZeroDivisionError: .*; mend the file"),
        ("raise SystemExit(1)", r"failed at line 1 with SystemExit"),
        ("x = 1", r"defines no function 'compute_score', nor any other"),
        (
            "def compute_scores(): ...\nasync def other(): ...\n",
            r"no function 'compute_score', only compute_scores, other: did you mean 'compute_scores'\?",
        ),
        ("def zzz(): ...", r"only zzz: set reward.name to one of them"),
        ("compute_score = 3", r"'compute_score' in reward file .* is a int, not a function"),
        (
            "def compute_score(prompt, completion): return 1",
            r"has the signature \(prompt, completion\), but verl calls it with the keyword arguments data_",
        ),
        ("def compute_score(a, b, c, d, /): return 1", r"has the signature"),
        (
            f"def compute_score({SIGNATURE}): return extra_info['tests']",
            r"raised KeyError on the sample \(data_source='math12k'\): 'tests'; mend the function",
        ),
        (f"def compute_score({SIGNATURE}): import sys; sys.exit(2)", r"raised SystemExit on the sample"),
        (
            f"def compute_score({SIGNATURE}): return None",
            r"returned a NoneType .*; it must return a finite number",
        ),
        (f"def compute_score({SIGNATURE}): return {{'acc': 1}}", r"returned a dict without 'score'; it must"),
        (f"def compute_score({SIGNATURE}): return float('nan')", r"returned nan for a score"),
        (
            f"import signal\ndef compute_score({SIGNATURE}): signal.signal(signal.SIGALRM, id)",
            r"raised ValueError on the sample .*: signal only works in main thread",
        ),
    ],
)
def test_each_mistake_is_one_sentence_with_file_and_function(write, source, message):
    path = write(source)
    with pytest.raises(RewardError, match=message) as caught:
        check_reward_function(path, "compute_score", SAMPLE)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RewardError, match=r"nothing\.py does not exist: set reward.path"):
        check_reward_function(tmp_path / "nothing.py", "compute_score", SAMPLE)


def test_settings_are_part_of_the_call(write):
    path = write(f"def compute_score({SIGNATURE}, *, bonus=0): return bonus")
    check_reward_function(path, "compute_score", SAMPLE, reward_kwargs={"bonus": 1})
    with pytest.raises(RewardError, match="unexpected keyword argument 'bonnus'"):
        check_reward_function(path, "compute_score", SAMPLE, reward_kwargs={"bonnus": 1})


def test_a_function_that_hangs_is_given_up(write):
    path = write(f"import time\ndef compute_score({SIGNATURE}): time.sleep(20)")
    with pytest.raises(RewardError, match=r"did not return within 0.2 s"):
        check_reward_function(path, "compute_score", SAMPLE, limit_seconds=0.2)


def test_a_timeout_error_of_the_functions_own_is_reported_as_such(write):
    path = write(f"def compute_score({SIGNATURE}): raise TimeoutError('server away')")
    with pytest.raises(RewardError, match=r"raised TimeoutError on the sample .*: server away"):
        check_reward_function(path, "compute_score", SAMPLE)


def test_a_failed_import_leaves_no_module_behind(write):
    path = write("raise ValueError('first try')")
    with pytest.raises(RewardError):
        check_reward_function(path, "compute_score", SAMPLE)
    assert not [name for name in sys.modules if name.startswith("reward_user_") and path.name in name]
    path.write_text(f"def compute_score({SIGNATURE}): return 1.0\n")
    check_reward_function(path, "compute_score", SAMPLE)


def test_the_shipped_files_pass_their_own_check():
    from reward import compute_score as builtin

    assert reward_keys(builtin.__file__, "compute_score", SAMPLE) == builtin.KEYS
    assert subprocess.run([sys.executable, builtin.__file__], timeout=30, check=False).returncode == 0
