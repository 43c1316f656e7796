"""The files as verl loads and calls them: by path, with reward_kwargs, from its reward manager."""

import asyncio
import inspect
import json
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from reward import compute_score as builtin
from reward import user
from reward.load import RewardError

RESPONSE = r"So \boxed{\frac{8}{2}}"


def score(**kwargs):
    return asyncio.run(user.compute_score("math", RESPONSE, "4", {"index": 0}, **kwargs))


@pytest.fixture
def my_reward(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(
        textwrap.dedent("""
        import threading
        loads = []
        def brevity(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
            if data_source == "broken":
                raise ValueError("broken sample")
            main = threading.current_thread() is threading.main_thread()
            return {"score": scale / len(solution_str), "in_main_thread": main}
        async def served(data_source, solution_str, ground_truth, extra_info=None):
            return 0.75
        """)
    )
    return str(path)


def test_without_a_users_file_the_built_in_reward_is_used():
    assert score() == {"score": 1.0, "acc": 1.0, "format": 1.0, "reward_error": 0.0}
    assert score(accuracy_weight=0.5)["score"] == 0.6


def test_a_failing_built_in_reward_keeps_its_keys():
    result = asyncio.run(user.compute_score("math", RESPONSE, ""))
    assert result == {"score": 0.0, "acc": 0.0, "format": 0.0, "reward_error": 1.0}


def test_a_users_function_gets_its_settings_off_the_main_thread(my_reward):
    result = score(user_path=my_reward, user_name="brevity", scale=len(RESPONSE))
    assert result == {"score": 1.0, "in_main_thread": 0.0, "reward_error": 0.0}


def test_a_users_async_function_is_awaited(my_reward):
    assert score(user_path=my_reward, user_name="served") == {"score": 0.75, "acc": 0.75, "reward_error": 0.0}


def test_the_users_file_is_loaded_once_per_process(my_reward):
    first = user._guarded(my_reward, "brevity", None)
    assert user._guarded(my_reward, "brevity", None) is first
    assert user._guarded(my_reward, "served", None) is not first


def test_a_file_that_cannot_be_loaded_is_an_error_and_no_zero(my_reward):
    with pytest.raises(RewardError, match="did you mean 'brevity'"):
        score(user_path=my_reward, user_name="brevty")


STUCK = """
import os, re, threading, time
def stuck(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "backtracks": re.match("(a+)+$", "a" * 40 + "b")
    if solution_str == "sleeps": time.sleep(60)
    if solution_str == "exits": os._exit(0)
    time.sleep(0.02)
    return {"score": 0.5, "length": len(solution_str)}
"""


@pytest.mark.parametrize("bad", ["backtracks", "sleeps", "exits"])
def test_a_call_that_never_returns_scores_zero_and_no_other_does(tmp_path, monkeypatch, bad):
    path, errors = tmp_path / "stuck.py", tmp_path / "errors.jsonl"
    path.write_text(STUCK)
    monkeypatch.setenv("PTL_REWARD_ERRORS", str(errors))

    async def both():
        where = {"user_path": str(path), "user_name": "stuck", "user_seconds": 0.5, "user_keys": {"length": "number"}}
        texts = ["a", "b", bad, "c", bad]
        return await asyncio.gather(
            *(user.compute_score("d", text, "4", {"index": i}, **where) for i, text in enumerate(texts))
        )

    zero = {"score": 0.0, "length": 0.0, "reward_error": 1.0}
    right = {"score": 0.5, "length": 1.0, "reward_error": 0.0}
    start = time.monotonic()
    assert asyncio.run(both()) == [right, right, zero, right, zero]
    assert time.monotonic() - start < 20
    records = [json.loads(line) for line in errors.read_text().splitlines()]
    assert sorted(record["index"] for record in records) == [2, 4]  # each sample is named
    reason = "ended its process (exit status 0)" if bad == "exits" else "did not return within 0.5 s"
    assert all(reason in record["error"] for record in records)


def test_slow_calls_that_come_back_are_none_that_hang(tmp_path):
    path = tmp_path / "slow.py"
    source = f"open({str(tmp_path / 'loads')!r}, 'a').write('x')\nimport threading, time\nlock = threading.Lock()\n"
    path.write_text(source + "def slow(**_):\n  with lock: time.sleep(0.3)\n  return 1\n")

    async def many():
        where = {"user_path": str(path), "user_name": "slow", "user_seconds": 0.8}
        return await asyncio.gather(*(user.compute_score("d", "x", "4", **where) for _ in range(5)))

    assert [result["score"] for result in asyncio.run(many())] == [1.0] * 5
    assert (tmp_path / "loads").read_text() == "x"  # none was given up and called again


def test_asynchronous_calls_wait_side_by_side_however_many_and_one_that_hangs_stops_no_other(tmp_path):
    calls, path = 100, tmp_path / "served.py"
    path.write_text(
        textwrap.dedent(f"""
        import asyncio, pathlib
        pathlib.Path({str(tmp_path / "loads")!r}).open("a").write("x")
        inside, all_there = 0, asyncio.Event()
        async def served(solution_str, **_):
            global inside
            inside += 1
            if inside == {calls}: all_there.set()
            await all_there.wait()
            if solution_str == "hangs": await asyncio.Event().wait()
            return 1
        """)
    )

    async def many():
        where = {"user_path": str(path), "user_name": "served", "user_seconds": 2}
        texts = ["hangs", *["x"] * (calls - 1)]
        return await asyncio.gather(*(user.compute_score("d", text, "4", **where) for text in texts))

    results = asyncio.run(many())
    assert [result["score"] for result in results] == [0.0] + [1.0] * (calls - 1)
    assert [result["reward_error"] for result in results] == [1.0] + [0.0] * (calls - 1)
    assert (tmp_path / "loads").read_text() == "x"


def test_an_asynchronous_call_that_holds_the_event_loop_scores_zero_and_no_other_does(tmp_path):
    path = tmp_path / "held.py"
    path.write_text(
        "import asyncio, time\nasync def held(solution_str, **_):\n"
        "    if solution_str == 'holds': time.sleep(60)\n    await asyncio.sleep(0.05)\n    return 1\n"
    )
    assert [result["score"] for result in calls(path, ["x", "holds", "y"], 0.5, "held")] == [1.0, 0.0, 1.0]


def calls(path, texts, seconds, name="mine"):
    """Results of calls that are made side by side."""

    async def all_of_them():
        where = {"user_path": str(path), "user_name": name, "user_seconds": seconds}
        return await asyncio.gather(*(user.compute_score("d", text, "4", **where) for text in texts))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(
    "source",
    [
        "import asyncio\nasync def mine(**_): await asyncio.sleep(60)\n",
        "import time\ndef mine(**_): time.sleep(60)\n",
    ],
    ids=["asynchronous", "synchronous"],
)
def test_many_calls_that_hang_are_not_waited_for_one_after_another(tmp_path, source):
    (tmp_path / "hangs.py").write_text(source)
    start = time.monotonic()
    results = calls(tmp_path / "hangs.py", ["x"] * 60, 0.5)
    assert [result["reward_error"] for result in results] == [1.0] * 60
    assert time.monotonic() - start < 25


def test_later_children_have_the_source_of_the_first(tmp_path):
    path = tmp_path / "edited.py"
    source = "import os\ndef mine(solution_str, **_):\n    if solution_str == 'exits': os._exit(0)\n    return SCORE\n"
    path.write_text(source.replace("SCORE", "1.0"))
    assert calls(path, ["x"], 5)[0]["score"] == 1.0
    for edited in (source.replace("SCORE", "0.25"), "def mine(:\n"):
        path.write_text(edited)
        assert [result["score"] for result in calls(path, ["exits", "x"], 5)] == [0.0, 1.0]
        assert calls(path, ["x"], 5)[0]["score"] == 1.0


def test_what_a_function_has_started_ends_with_its_process(tmp_path):
    path = tmp_path / "starts.py"
    path.write_text(
        "import subprocess\ndef mine(**_):\n"
        f"    open({str(tmp_path / 'pids')!r}, 'a').write(str((p := subprocess.Popen(['sleep', '300'])).pid) + ' ')\n"
        "    p.wait()\n"
    )
    assert calls(path, ["x"], 1.0)[0]["reward_error"] == 1.0
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2  # with others and alone
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(int(pid)) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(int(pid)) for pid in pids)


def test_a_function_that_holds_its_interpreter_ends_with_the_process_that_called_it(tmp_path):
    path = tmp_path / "holds.py"
    path.write_text(
        "import os, re\nasync def mine(**_):\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n    re.match('(a+)+$', 'a' * 40 + 'b')\n"
    )
    code = (
        "import asyncio, pathlib, sys, time; from reward import user\n"
        "async def main():\n"
        "    asyncio.ensure_future(user.compute_score('d', 'x', '4', user_path=sys.argv[1], user_name='mine'))\n"
        "    while not pathlib.Path(sys.argv[2]).exists(): await asyncio.sleep(0.05)\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", code, path, tmp_path / "pid"], check=True, timeout=60)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_long_text_for_a_function_that_holds_its_interpreter_is_not_waited_for(tmp_path):
    path = tmp_path / "holds.py"
    path.write_text(
        "import re\nasync def mine(solution_str, **_):\n"
        "    if solution_str == 'holds': re.match('(a+)+$', 'a' * 40 + 'b')\n    return 1\n"
    )

    async def both():
        where = {"user_path": str(path), "user_name": "mine", "user_seconds": 0.5}
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(user.compute_score("d", "holds", "4", **where), 2)
        return await user.compute_score("d", "x" * 1_000_000, "4", **where)

    assert asyncio.run(both())["score"] == 1.0


def test_arguments_that_the_child_cannot_read_are_said_and_stop_no_other(tmp_path, monkeypatch):
    path, errors = tmp_path / "fine.py", tmp_path / "errors.jsonl"
    path.write_text("def mine(**_): return 1\n")
    monkeypatch.setenv("PTL_REWARD_ERRORS", str(errors))
    module = type(sys)("only_here")
    exec("class Thing: pass", module.__dict__)
    module.Thing.__module__ = "only_here"
    monkeypatch.setitem(sys.modules, "only_here", module)

    async def both():
        where = {"user_path": str(path), "user_name": "mine"}
        return await asyncio.gather(
            user.compute_score("d", "x", "4", thing=module.Thing(), **where), user.compute_score("d", "x", "4", **where)
        )

    assert [result["score"] for result in asyncio.run(both())] == [0.0, 1.0]
    assert "No module named 'only_here'" in json.loads(errors.read_text())["error"]


def test_settings_that_cannot_be_handed_over_are_an_error_of_the_sample(my_reward):
    assert score(user_path=my_reward, user_name="brevity", scale=threading.Lock())["reward_error"] == 1.0


# What follows needs verl itself, which the reward files do not.


def load_through_verl(path, reward_kwargs):
    omegaconf = pytest.importorskip("omegaconf")
    reward = pytest.importorskip("verl.trainer.ppo.reward")
    function = {"path": path, "name": "compute_score", "reward_kwargs": reward_kwargs}
    return reward.get_custom_reward_fn(omegaconf.OmegaConf.create({"reward": {"custom_reward_function": function}}))


def test_verl_loads_the_built_in_file_by_path():
    function = load_through_verl(builtin.__file__, {"format_weight": 0.2})
    assert not inspect.iscoroutinefunction(function)
    results = []
    call = {"data_source": "math", "solution_str": RESPONSE, "ground_truth": "4", "extra_info": {}}
    thread = threading.Thread(target=lambda: results.append(function(**call)))
    thread.start()
    thread.join()
    assert results == [{"score": pytest.approx(1.1), "acc": 1.0, "format": 1.0}]


def test_verl_averages_what_the_guard_returns_even_where_samples_fail(my_reward):
    metrics = pytest.importorskip("verl.trainer.ppo.metric_utils")
    keys = {"in_main_thread": "number"}
    settings = {"user_path": my_reward, "user_name": "brevity", "user_keys": keys, "scale": len(RESPONSE)}
    function = load_through_verl(user.__file__, settings)
    assert inspect.iscoroutinefunction(function)

    async def both():
        call = {"solution_str": RESPONSE, "ground_truth": "4", "extra_info": {"index": 1}}
        return [await function(data_source=source, **call) for source in ("math", "broken")]

    results = asyncio.run(both())
    assert results[0].keys() == results[1].keys() == {"score", "in_main_thread", "reward_error"}
    infos = {key: [result[key] for result in results] for key in results[0]}
    means = metrics.process_validation_metrics(["math", "math"], ["a", "b"], infos)["math"]
    assert means["score"]["mean@1"] == 0.5
    assert means["reward_error"]["mean@1"] == 0.5
