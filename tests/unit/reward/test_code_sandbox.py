"""The code reward's parent: its threads, its own end, and machines that can confine less."""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile import DEFAULT, ONE, run

from reward.programs import sandbox
from reward.programs.sandbox import Limits, Sandbox
from reward.programs.seccomp import compile_filters
from reward.programs.unit_tests import plan_tests

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


# Machines with fewer layers.


def test_a_machine_that_cannot_confine_is_an_error_that_names_what_is_missing():
    with pytest.raises(RuntimeError, match="no seccomp: programs of a policy cannot be confined"):
        Sandbox(without=("seccomp",)).run("", ONE)
    with pytest.raises(RuntimeError, match="no landlock or user namespaces"):
        Sandbox(without=("landlock", "namespaces")).run("", ONE)


def test_without_any_layer_a_daemon_is_still_killed(tmp_path):
    weak = Sandbox(without=("landlock", "namespaces", "seccomp"), allow_weaker_limits=True)
    file = tmp_path / "pid"
    file.touch()
    program = f"""
        import os, time
        def f():
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    open({str(file)!r}, "w").write(str(os.getpid()))
                    time.sleep(60)
                os._exit(0)
            os.wait()
            while not os.path.getsize({str(file)!r}): time.sleep(0.01)
            return 1
    """
    outcome = run(program, sandbox=weak)
    assert (outcome.passed, outcome.held) == ((True,), ())
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="by means of Linux, and this is darwin"):
        Sandbox()


def simulate(programs, *call):
    """Interpret filters as the kernel does, which takes the strictest verdict; refused and missing never meet."""
    verdicts = {interpret(program, *call) for program in programs}
    assert not {"refuse", "missing"} <= verdicts
    return min(verdicts, key=["kill", "missing", "refuse", "allow"].index)


def interpret(program, machine, number, *arguments):
    archs = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "i386": 0x40000003}
    data = struct.pack("=IIQ6Q", number, archs[machine], 0, *arguments, *[0] * (6 - len(arguments)))
    position, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, 8 * position)
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x05:
            position += value
        elif code == 0x06:
            return {0x80000000: "kill", 0x7FFF0000: "allow", 0x50001: "refuse", 0x50026: "missing"}[value]
        else:
            position += if_true if (accumulator == value if code == 0x15 else accumulator >= value) else if_false


@pytest.mark.parametrize(
    ("machine", "read", "openat", "clone", "kill", "socketpair", "mkdirat"),
    [("x86_64", 0, 257, 56, 62, 53, 258), ("aarch64", 63, 56, 220, 129, 199, 34)],
)
def test_the_filter_on_both_architectures(monkeypatch, machine, read, openat, clone, kill, socketpair, mkdirat):
    for writable in (True, False):
        monkeypatch.setattr("platform.machine", lambda: machine)
        program = compile_filters(writable)

        def verdict(*call, program=program):
            return simulate(program, machine, *call)

        assert verdict(read) == "allow"
        assert verdict(clone, 0x3D0F00) == "allow"  # pthread_create
        assert verdict(clone, 0x1200011) == "refuse"  # fork
        assert verdict(kill, 1, 9) == "refuse"
        assert [verdict(socketpair, 1, kind) for kind in (0x80001, 2)] == ["allow", "refuse"]
        assert [verdict(number) for number in (424, 425, 435, 437, 9999, 2**30 + kill)] == [
            "missing"
        ] * 6  # the last is x32's
        assert verdict(439) == "allow"
        changing = "allow" if writable else "refuse"
        assert verdict(mkdirat) == changing
        assert [verdict(openat, 0, 0, os.O_RDONLY), verdict(openat, 0, 0, os.O_CREAT)] == ["allow", changing]
        assert simulate(program, "i386", read) == "kill"
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert compile_filters(True) == []


# The parent.


def test_many_threads_get_their_own_results():
    programs = [f"def f(): return {i}" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda i: run(programs[i], [f"assert f() == {i}", "assert f() % 2"]), range(24)))
    assert [outcome.passed for outcome in outcomes] == [(True, bool(i % 2)) for i in range(24)]


def test_programs_at_a_time_are_bounded():
    sandbox = Sandbox(workers=1)
    start = time.monotonic()
    threads = [threading.Thread(target=run, args=("import time; time.sleep(0.3)", ONE, sandbox)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start > 0.9


def test_children_that_do_not_start_are_an_error_and_no_zero(monkeypatch):
    monkeypatch.setattr(sandbox, "_BOOT", "raise SystemExit('no such thing')")
    with pytest.raises(RuntimeError, match=r"did not start \(exit status 1.*no such thing"):
        DEFAULT.run("", ONE)


def test_a_judge_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(sandbox, "_GRACE_SECONDS", 0.0)
    setup = "def endless():\n  while True: pass"
    endless = plan_tests(json.dumps({"tests": ["assert f() == endless()"], "setup": setup}))

    def ended(seconds: float) -> str:
        return run("def f(): return 1", endless, Sandbox(Limits(wall_seconds=seconds))).ended

    try:
        how = ended(4)
    except RuntimeError as error:
        if "did not start" not in str(error):
            raise
        how = ended(20)  # on a busy machine its processes take longer to start
    assert how in ("died", "timeout")


PARENT = """
import sys, tempfile, threading
from reward.programs.sandbox import Sandbox
from reward.programs.unit_tests import plan_tests
tempfile.tempdir = sys.argv[1]
print(flush=True)
Sandbox().run("import time; time.sleep(60)", plan_tests("assert f() == 1"))
"""


def test_a_killed_parent_leaves_neither_processes_nor_folders(tmp_path):
    folder = tmp_path / "folders"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE)
    parent.stdout.readline()
    deadline = time.monotonic() + 10
    running = []
    while len(running) < 2 and time.monotonic() < deadline:
        running = processes_of(str(folder))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    while (processes_of(str(folder)) or list(folder.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(running) >= 2
    assert processes_of(str(folder)) == []


def processes_of(folder):
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f'"folder": "{folder}/'.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found
