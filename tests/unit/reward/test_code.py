"""Hostile programs, really run: what each must not do, by the layer that refuses it."""

import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import DEFAULT, ONLY_NAMESPACES, WITHOUT_LANDLOCK, attempt, libc, needs, run

from reward.programs.sandbox import Limits, Sandbox
from reward.programs.unit_tests import plan_tests

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


# Time, memory and output.


@pytest.mark.parametrize(
    "loop",
    [
        "while True: pass",
        "any(itertools.repeat(False))",  # in C, where no Python signal handler runs
        "def f():\n  while True:\n    try: f()\n    except BaseException: pass\nf()",
    ],
)
def test_processor_time_is_bounded(loop):
    sandbox = Sandbox(Limits(cpu_seconds=1))
    setup = "import itertools, signal, time\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
    assert run(setup + loop, sandbox=sandbox).ended == "timeout"


def test_wall_clock_time_is_bounded():
    start = time.monotonic()
    outcome = run("import time\ndef f(): time.sleep(60)", sandbox=Sandbox(Limits(wall_seconds=0.5)))
    assert (outcome.ended, outcome.passed) == ("timeout", (False,))
    assert time.monotonic() - start < 5


def test_a_reply_that_drips_is_waited_for_no_longer_than_another():
    program = """
        import os, time
        def f():
            for fd in range(3, 64):
                try: os.write(fd, (1000).to_bytes(4, "big"))
                except OSError: continue
                for _ in range(600):
                    os.write(fd, b" ")
                    time.sleep(0.01)
    """
    start = time.monotonic()
    assert run(program, sandbox=Sandbox(Limits(wall_seconds=0.6))).ended == "timeout"
    assert time.monotonic() - start < 3


def test_a_dripping_program_is_looked_at_all_the_same():
    program = """
        import os, threading, time
        for _ in range(40): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        for fd in range(3, 64):
            try: os.write(fd, (4000).to_bytes(4, "big"))
            except OSError: continue
            while True:
                os.write(fd, b" ")
                time.sleep(0.002)
    """
    assert run(program, sandbox=Sandbox(Limits(wall_seconds=4))).ended == "excess"


@pytest.mark.parametrize("sandbox", [DEFAULT, WITHOUT_LANDLOCK])
@pytest.mark.parametrize("act", ["open({path!r}, 'w')", "os.fork()", "os.kill(os.getppid(), 9)", "socket.socket()"])
def test_what_a_test_does_to_a_result_is_as_confined_as_the_program(tmp_path, sandbox, act):
    path = tmp_path / "precious"
    test = f"assert f() == 1 and {act.format(path=str(path))}"
    truth = {"tests": [test], "setup": "import os, socket", "entry": ["f"]}
    outcome = run("def f(): return 1", plan_tests(truth), sandbox)
    assert outcome.passed == (False,) and "PermissionError" in outcome.message
    assert not path.exists()


@pytest.mark.parametrize(
    "test", ["assert f() in range(10**12)", "assert sum(range(10**11)) == f()", "assert time.sleep(60) or f()"]
)
def test_the_referee_has_the_same_limits(test):
    start = time.monotonic()
    plan = plan_tests([test, "assert f() == 'x'"])
    outcome = run("def f(): return 'x'", plan, Sandbox(Limits(cpu_seconds=1, wall_seconds=2)))
    assert (outcome.ended, outcome.passed) == ("timeout", (False, False))
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("bomb", ["bytearray(10**10)", "[0] * 10**9", "list(range(10**9))", "1 << 10**11"])
def test_memory_is_bounded(bomb):
    assert "MemoryError" in run(f"def f(): return len({bomb})").message


def test_a_result_too_large_to_compare_is_wrong():
    assert "parts" in run("def f(): return [0] * 10**6").message
    assert "parts" in run("def f(): return iter(int, 1)").message


def test_output_goes_nowhere():
    flood = "import sys\nfor _ in range(2000): print('x' * 10**5); sys.stderr.write('y' * 10**5)\ndef f(): return 1"
    assert run(flood).passed == (True,)


def test_files_are_bounded_in_size_and_number():
    needs("landlock")
    assert attempt("with open('a', 'wb') as file: file.write(bytes(2**21))") == "OSError"
    at_once = "def f():\n  try: files = [open(f'a{i}', 'w') for i in range(100)]\n  except OSError: return 'refused'"
    outcome = run(at_once, ["assert f() == 'refused'"])
    # Whichever comes first: the limit of open files, or the judge, who counts what lies in the folder.
    assert outcome.passed == (True,) or outcome.ended == "excess"
    many = "import itertools\nfor i in itertools.count(): open(str(i), 'w').close()"
    assert run(many).ended == "excess"


# Ends that must not pass, and forged results.


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("import sys; sys.exit(0)", "error"),
        ("import os; os._exit(0)", "died"),
        ("def f(): raise SystemExit(0)", "ok"),
        ("import os\ndef f(): os._exit(0)", "died"),
        ("import atexit, os\natexit.register(os._exit, 0)\ndef f(): raise SystemExit", "ok"),
        ("import ctypes; ctypes.string_at(1)", "died"),
        ("import os\nfor fd in range(3, 64):\n  try: os.close(fd)\n  except OSError: pass", "died"),
    ],
)
def test_an_early_end_is_no_success(program, ended):
    outcome = run(program)
    assert (outcome.ended, outcome.passed) == (ended, (False,))


@pytest.mark.parametrize(
    "program",
    [
        "class Equal:\n  def __eq__(self, other): return True\ndef f(): return Equal()",
        "class Equal(int):\n  def __eq__(self, other): return True\ndef f(): return Equal(7)",
        "class Equal(list):\n  def __eq__(self, other): return True\ndef f(): return Equal([7])",
        "import builtins\nbuiltins.bool = lambda value: True\nbuiltins.AssertionError = SystemExit\ndef f(): return 2",
        'print(\'{"passed": [true], "ended": "ok"}\')\ndef f(): return 2',
    ],
)
def test_objects_that_equal_everything_and_patched_builtins_do_not_pass(program):
    assert run(program).passed == (False,)
    assert run(program, ["assert f() == 1 and 1 == f()", "assert 1 in [f()]"]).passed == (False, False)


def test_a_program_that_writes_verdicts_to_every_descriptor_does_not_pass():
    program = """
        import json, os
        def f():
            for message in ({"passed": [True], "ended": "ok"}, [True], {"ok": True}):
                data = json.dumps(message).encode()
                for fd in range(3, 64):
                    for text in (len(data).to_bytes(4, "big") + data, data + b"\\n"):
                        try: os.write(fd, text)
                        except OSError: pass
            return 2
    """
    assert run(program, ["assert f() == 1", "assert f() == 3"]).passed == (False, False)


def test_expected_values_are_nowhere_in_the_programs_process():
    search = """
        import gc, os, sys
        def f():
            frame, seen = sys._getframe(), []
            while frame:
                seen.append(repr(frame.f_locals) + repr(frame.f_code.co_consts))
                frame = frame.f_back
            seen += [repr(item) for item in gc.get_objects() if type(item) in (dict, list, tuple)]
            for name in ("cmdline", "environ", "mem"):
                for pid in ("self", os.getppid()):
                    try: seen.append(repr(open(f"/proc/{pid}/{name}", "rb").read()))
                    except OSError: pass
            return any("-".join(("needle", "in", "the", "test")) in text for text in seen)
    """
    assert run(search, ["assert f() == False and 'needle-in-the-test'"]).passed == (True,)


# Processes, signals, network, files and secrets.


@pytest.mark.parametrize("sandbox", [DEFAULT, WITHOUT_LANDLOCK, Sandbox(without=("namespaces",))])
def test_nobody_is_killed(sandbox):
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for target in ("os.getppid()", victim.pid, os.getpid(), -1, 0):
            assert attempt(f"os.kill({target}, 9)", sandbox) == "PermissionError"
        assert attempt(f"os.pidfd_open({victim.pid})", sandbox) == "OSError"
        assert attempt(libc("62" if os.uname().machine == "x86_64" else "129", victim.pid, 9), sandbox) != "it worked"
        assert attempt("import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())", sandbox) == "PermissionError"
        limit = f"import resource; resource.prlimit({victim.pid}, resource.RLIMIT_CPU, (1, 1))"
        assert attempt(limit, sandbox) == "PermissionError"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.parametrize(
    "body",
    [
        "os.fork()",
        "os.forkpty()",
        "subprocess.run(['/bin/true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "os.setsid()",
        libc(435, "ctypes.create_string_buffer(88)", 88),  # clone3
        libc(425, 8, "ctypes.create_string_buffer(120)"),  # io_uring_setup
    ],
)
def test_no_process_can_be_started(body):
    assert attempt(body) in ("PermissionError", "OSError")


def test_threads_work_and_are_bounded():
    threads = "from concurrent.futures import ThreadPoolExecutor as Pool\ndef f(): return sum(Pool(16).map(int, '01'))"
    assert run(threads).passed == (True,)
    many = """
        import threading, time
        def f():
            for _ in range(40): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            time.sleep(5)
            return 1
    """
    assert run(many).ended == "excess"
    assert run(many.replace("40", "10**6").replace("(5)", "(0)")).passed == (False,)


def test_event_loops_work():
    assert run("import asyncio\nasync def one(): return 1\ndef f(): return asyncio.run(one())").passed == (True,)


@pytest.mark.parametrize("sandbox", [DEFAULT, WITHOUT_LANDLOCK, ONLY_NAMESPACES])
def test_there_is_no_network(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        held = run("", sandbox=sandbox).held
        if "seccomp" not in held and "namespaces" not in held:
            pytest.skip("this kernel has no namespaces for us")
        assert attempt(f"socket.create_connection(('127.0.0.1', {port}), 2)", sandbox) in ("PermissionError", "OSError")
        if "seccomp" in held:
            assert attempt("socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", sandbox) == "PermissionError"
            assert attempt("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", sandbox) == "PermissionError"


@pytest.mark.parametrize("sandbox", [DEFAULT, WITHOUT_LANDLOCK])
@pytest.mark.parametrize(
    "body",
    [
        "open({path!r}, 'a').write('x')",
        "open({path!r} + '.new', 'w')",
        "os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "os.truncate({path!r}, 0)",
        "os.chmod({path!r}, 0)",
        "os.chown({path!r}, -1, -1)",
        "os.utime({path!r})",
        "os.setxattr({path!r}, 'user.a', b'b')",
        "os.remove({path!r})",
        "os.rename({path!r}, {path!r} + '.new')",
        "os.symlink('/', {path!r} + '.new')",
        "os.link({path!r}, 'here')",
        "os.mkdir({path!r} + '.new')",
    ],
)
def test_nothing_outside_its_folder_can_be_changed(tmp_path, sandbox, body):
    path = tmp_path / "precious"
    path.write_text("precious")
    before = path.stat()
    assert attempt(body.format(path=str(path)), sandbox) in ("PermissionError", "OSError")
    after = path.stat()
    assert path.read_text() == "precious"
    assert (before.st_mode, before.st_mtime, before.st_nlink) == (after.st_mode, after.st_mtime, after.st_nlink)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folders", "precious"]


def test_files_in_its_own_folder_work_where_landlock_can_keep_them_there():
    program = """
        import tempfile
        def f():
            with tempfile.TemporaryFile("w+") as file:
                file.write("1")
                file.seek(0)
                return int(file.read())
    """
    needs("landlock")
    assert run(program).passed == (True,)
    assert run(program, sandbox=WITHOUT_LANDLOCK).passed == (False,)


def test_memory_semaphores_and_queues_of_others_are_out_of_reach():
    libc = ctypes.CDLL(None, use_errno=True)
    made = [libc.shmget(0, 4096, 0o1666), libc.semget(0, 1, 0o1666), libc.msgget(0, 0o1666)]
    try:
        for sandbox in (DEFAULT, Sandbox(without=("namespaces",))):
            for call, arguments in (
                ("shmat", f"{made[0]}, None, 0"),
                ("shmctl", f"{made[0]}, 2, ctypes.create_string_buffer(256)"),
                ("semctl", f"{made[1]}, 0, 12"),
                ("semop", f"{made[1]}, ctypes.create_string_buffer(6), 1"),
                ("msgctl", f"{made[2]}, 2, ctypes.create_string_buffer(256)"),
                ("msgsnd", f"{made[2]}, ctypes.create_string_buffer(b'{chr(1)}' * 16), 1, 0o4000"),
            ):
                body = f"""
                    libc = ctypes.CDLL(None, use_errno=True)
                    libc.shmat.restype = ctypes.c_long
                    if libc.{call}({arguments}) == -1:
                        raise OSError(ctypes.get_errno(), "")
                """
                assert attempt(body, sandbox) == "PermissionError", (call, sandbox.without)
    finally:
        libc.shmctl(made[0], 0, None)
        libc.semctl(made[1], 0, 0)
        libc.msgctl(made[2], 0, None)


@pytest.mark.parametrize("sandbox", [DEFAULT, WITHOUT_LANDLOCK])
def test_secrets_of_the_environment_stay_secret(sandbox):
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"],
        env={"SECRET": "hush"},
        stdout=subprocess.PIPE,
    )
    try:
        child.stdout.readline()
        assert "hush" in Path(f"/proc/{child.pid}/environ").read_text()
        own = "import os\ndef f(): return sorted(os.environ)"
        harmless = ["assert set(f()) <= {'LC_CTYPE', 'TMPDIR', 'LD_LIBRARY_PATH', 'MALLOC_ARENA_MAX'}"]
        assert run(own, harmless, sandbox).passed == (True,)
        for name in ("environ", "mem", "fd/1", "maps"):
            body = f"open('/proc/{child.pid}/{name}').read()"
            assert attempt(body, sandbox) in ("PermissionError", "FileNotFoundError")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
