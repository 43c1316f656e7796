"""The math-verify processes: bounded, replaced, and gone when their parent is."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from reward import judge_pool
from reward.judge_pool import JudgePool

TOWER = "9^{9^{9^{9}}}"


@pytest.fixture
def pool():
    pool = JudgePool(workers=1, limit_seconds=1.0)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def lasting():
    """A pool for tests after which its next question is answered as ever; a worker takes a second to start."""
    pool = JudgePool(workers=1, limit_seconds=1.0)
    yield pool
    pool.close()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_starts_nothing_before_the_first_question(pool):
    assert pool._idle == []
    assert pool.judge("1/2", "0.5") == "equal"
    assert pool.judge("1/2", "0.6") == "different"
    assert len(pool._idle) == 1


def test_hostile_power_returns_within_its_limit_and_the_next_answer_is_right(lasting):
    lasting.judge("1", "1+0")
    start = time.monotonic()
    assert lasting.judge("7", TOWER) == "timeout"
    assert time.monotonic() - start < 4.0 * lasting.limit_seconds + 2.0
    assert lasting.judge("1/2", "0.5") == "equal"


STUCK_WORKER = """
import itertools, json, sys
from reward import judge_worker
# One endless call into C that never looks for signals.
judge_worker._is_equal = lambda gold, answer: gold == "1" or any(itertools.repeat(False))
judge_worker.main(*json.loads(sys.argv[3]))
"""


def test_code_that_never_returns_to_the_interpreter_is_ended_by_the_kernel(pool, monkeypatch, tmp_path):
    # No Python signal handler runs inside a C call, and the parent's own limit is far away.
    monkeypatch.setattr(judge_pool, "_WALL_PER_CPU_SECOND", 100.0)
    stuck = tmp_path / "stuck.py"
    stuck.write_text(STUCK_WORKER)
    with monkeypatch.context() as patch:
        patch.setattr(judge_pool, "_WORKER", str(stuck))
        assert pool.judge("1", "1") == "equal"
        (judge,) = pool._idle
        assert pool.judge("7", "8") == "timeout"
    assert judge.process.returncode == -signal.SIGVTALRM
    assert pool.judge("1/2", "0.5") == "equal"


def test_a_hung_worker_is_killed_and_replaced(lasting, monkeypatch):
    monkeypatch.setattr(judge_pool, "_WALL_PER_CPU_SECOND", 0.3)
    lasting.judge("1", "1+0")
    (judge,) = lasting._idle
    os.kill(judge.process.pid, signal.SIGSTOP)
    assert lasting.judge("1/2", "0.5") == "timeout"
    assert judge.process.returncode == -signal.SIGKILL
    monkeypatch.undo()
    assert lasting.judge("1/2", "0.5") == "equal"


def test_a_worker_killed_while_idle_is_replaced(lasting):
    lasting.judge("1", "1+0")
    (judge,) = lasting._idle
    os.kill(judge.process.pid, signal.SIGKILL)
    assert wait_until_gone(judge.process.pid, 5.0)
    assert lasting.judge("1/2", "0.5") == "equal"
    assert lasting._idle[0].process.pid != judge.process.pid


def test_a_worker_killed_while_busy_costs_one_retry(monkeypatch):
    pool = JudgePool(workers=1, limit_seconds=30.0)
    try:
        pool.judge("1", "1+0")
        (judge,) = pool._idle
        os.kill(judge.process.pid, signal.SIGSTOP)  # holds the question until the kill
        threading.Timer(0.3, judge.process.kill).start()
        assert pool.judge("1/2", "0.5") == "equal"
    finally:
        pool.close()


def test_address_space_is_bounded(lasting):
    lasting.judge("1", "1+0")
    limits = Path(f"/proc/{lasting._idle[0].process.pid}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max address space"))
    assert line.split()[3] == str(2 * 2**30)


def test_a_closed_pool_kills_its_workers_and_says_so(pool):
    pool.judge("1", "1+0")
    pid = pool._idle[0].process.pid
    pool.close()
    assert not is_running(pid)
    with pytest.raises(RuntimeError, match="closed"):
        pool.judge("1", "1+0")


def test_a_broken_installation_is_an_error_and_no_zero(pool, monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(judge_pool, "_WORKER", str(broken))
    with pytest.raises(RuntimeError, match=r"did not start \(exit status 3\)"):
        pool.judge("1", "1+0")


def test_the_callers_folder_cannot_shadow_the_workers_imports(pool, monkeypatch, tmp_path):
    for name in ("json", "sympy", "math_verify", "reward"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert pool.judge("1/2", "0.5") == "equal"


PARENT = """
import sys, threading, time
from reward.judge_pool import JudgePool
pool = JudgePool(workers=1, limit_seconds=2.0)
pool.judge("1", "1+0")
print(pool._idle[0].process.pid, flush=True)
if sys.argv[1] == "busy":
    threading.Thread(target=pool.judge, args=("7", sys.argv[2]), daemon=True).start()
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_no_worker_outlives_a_killed_parent(state):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, state, TOWER], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(pid, 60.0)  # within seconds where the cores are free


def test_a_forked_child_gets_a_pool_of_its_own():
    from reward.accuracy import accuracy_reward

    assert accuracy_reward(r"\boxed{0.5}", "1/2") == 1.0  # the parent's pool is running
    script = (
        "import os\n"
        "from reward.accuracy import accuracy_reward as ask\n"
        "assert ask(r'\\boxed{0.5}', '1/2') == 1.0\n"
        "child = os.fork()\n"
        "right = ask(r'\\boxed{0.25}', '1/4') == 1.0 and ask(r'\\boxed{0.3}', '1/4') == 0.0\n"
        "if child == 0:\n"
        "    os._exit(0 if right else 1)\n"
        "assert right and os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


ANYWHERE = """
import os, sys
print("the top level runs", flush=True)
from reward import judge_pool
assert judge_pool.default_pool().judge("1/2", "0.5") == "equal"
if os.fork() == 0:
    sys.exit()  # runs what is registered for the exit, which must leave the parent's judges alone
assert os.wait()[1] == 0
judge_pool._Judge.__init__ = None  # no other judge can start
assert judge_pool.default_pool().judge("1/4", "0.25") == "equal"
"""


@pytest.mark.parametrize("kind", ["script", "stdin"])
def test_the_parents_main_module_is_not_executed_again(kind, tmp_path):
    """It needs no main guard, and no file: a notebook has neither."""
    script = tmp_path / "script.py"
    script.write_text(ANYWHERE)
    command, text = ([str(script)], None) if kind == "script" else (["-"], ANYWHERE)
    result = subprocess.run([sys.executable, *command], input=text, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "the top level runs\n", "")


def test_a_question_in_a_pool_that_is_closed_gets_an_error_at_once():
    pool = JudgePool(workers=1, limit_seconds=30.0)
    pool.judge("1", "1+0")
    threading.Timer(0.5, pool.close).start()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="closed"):
        pool.judge("7", TOWER)
    assert time.monotonic() - start < 10.0


def test_a_process_whose_standard_streams_are_closed(repository):
    """As a daemon's are: the pipe then has a number that the child wants for itself."""
    code = "from reward.judge_pool import JudgePool; import sys; sys.exit(JudgePool(1).judge('1/2', '0.5') != 'equal')"
    command = f'exec "$0" -c "{code}" 0<&- 1>&-'
    run = subprocess.run(["bash", "-c", command, sys.executable], cwd=repository, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stderr
