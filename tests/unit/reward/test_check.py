"""The check before a run: one clear sentence for each way in which a reward file can be wrong."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from reward.check import RewardError, check_loads, check_reward_function, reward_keys

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


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import os; os._exit(0)", r"ended its process \(exit status 0\) on the sample"),
        ("import ctypes; ctypes.string_at(1)", r"ended its process \(exit status -11\) on the sample"),
        ("import re; re.match('(a+)+$', 'a' * 40 + 'b')", "did not return within 1 s on the sample"),
        ("raise Mute", r"raised Mute on the sample .*\(its text cannot be had\)"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt on the sample"),
        ("return Mute", "returned a type for a score"),
    ],
)
def test_what_a_function_does_to_its_process_is_a_sentence(write, body, message):
    mute = "class Mute(Exception):\n    def __str__(self): raise SystemExit(0)\n"
    path = write(f"{mute}def compute_score({SIGNATURE}): {body}")
    with pytest.raises(RewardError, match=message):
        check_reward_function(path, "compute_score", SAMPLE, limit_seconds=1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os; os._exit(0)", r"importing reward file .* ended its process \(exit status 0\): mend the file"),
        ("class Mute(Exception):\n    def __str__(self): raise OSError\nraise Mute", "failed at line 3 with Mute"),
        ("raise KeyboardInterrupt", "failed at line 1 with KeyboardInterrupt"),
    ],
)
def test_what_a_file_does_to_its_process_is_a_sentence(write, source, message):
    with pytest.raises(RewardError, match=message):
        check_loads(write(source), "compute_score")


def test_the_folder_and_the_environment_stay_as_they_are(write, monkeypatch):
    here = Path.cwd()
    path = write(f"import os, sys\nos.chdir('/')\nos.environ['MINE'] = '1'\ndef compute_score({SIGNATURE}): return 1")
    check_reward_function(path, "compute_score", SAMPLE)
    assert (Path.cwd(), os.environ.get("MINE")) == (here, None)


def test_a_file_may_import_its_neighbours(write, tmp_path):
    (tmp_path / "my_neighbour.py").write_text("VALUE = 0.5\n")
    (tmp_path / "my_late_neighbour.py").write_text("VALUE = 0.5\n")
    path = write(f"""
        import my_neighbour
        def compute_score({SIGNATURE}):
            import my_late_neighbour
            return {{"score": my_neighbour.VALUE, "late": my_late_neighbour.VALUE}}
    """)
    assert reward_keys(path, "compute_score", SAMPLE) == {"late": "number"}


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
