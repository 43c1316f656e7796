"""A few child processes that judge answers with math-verify, replaced when they hang or die.

math-verify cannot run in a reward worker itself: its time limit needs the main thread, sympy holds the
interpreter lock for as long as a hostile answer wishes, and can eat all memory. verl's own scorer uses a
`ProcessPoolExecutor`, in which a timed-out task occupies its process for ever and four of them block the
pool; spawning also re-imports the parent's main module. Here every child is one `judge_worker.py` behind a
pipe, which can be killed alone.
"""

import atexit
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from pathlib import Path

logger = logging.getLogger("reward")

_WORKER = str(Path(__file__).with_name("judge_worker.py"))
# The child gets our import path and nothing else: with a script's own folder on it, the modules of `reward` would
# become top-level modules, and the current directory could hold anything.
_BOOT = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import json, runpy; "
    "sys.path[:] = json.loads(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='__main__')"
)
_START_SECONDS = 120.0
# CPU seconds limit a child from inside; this many times as long on the wall clock means that it hangs.
_WALL_PER_CPU_SECOND = 4.0


class _Judge:
    """One child process. Not thread-safe: a judge belongs to one caller at a time."""

    def __init__(self, limit_seconds: float, memory_bytes: int) -> None:
        self.connection, end = Pipe()
        with end:  # where a daemon has closed its own, this may be 0, 1 or 2, which the child needs itself
            theirs = fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
        settings = (theirs, os.getpid(), limit_seconds, memory_bytes)
        arguments = [_WORKER, json.dumps([str(entry) for entry in sys.path]), json.dumps(settings)]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _BOOT, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs],
        )
        os.close(theirs)
        try:
            self._read(_START_SECONDS)
        except (EOFError, OSError) as error:
            self.kill()
            raise RuntimeError(
                f"the math-verify process did not start (exit status {self.process.returncode}); its message "
                f"is on this process's stderr. Is math-verify installed for {sys.executable}?"
            ) from error
        except BaseException:
            self.kill()
            raise

    def ask(self, gold: str, answer: str, whole_texts: bool, wall_seconds: float) -> str:
        """Return the verdict. After any error (TimeoutError; EOFError or OSError of the dead) it must be killed."""
        self.connection.send_bytes(json.dumps([gold, answer, whole_texts]).encode("ascii"))
        return self._read(wall_seconds)

    def _read(self, wall_seconds: float) -> str:
        if not self.connection.poll(wall_seconds):
            raise TimeoutError
        return self.connection.recv_bytes().decode("ascii")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class JudgePool:
    """At most `workers` judges, started when first needed.

    `limit_seconds` is CPU time per answer, `memory_gib` the address space of one judge.
    """

    def __init__(self, workers: int = 2, limit_seconds: float = 3.0, memory_gib: float = 2.0) -> None:
        self.limit_seconds = limit_seconds
        self.memory_bytes = int(memory_gib * 2**30)
        self._slots = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._idle: list[_Judge] = []
        self._busy: set[_Judge] = set()
        self._closed = False

    def judge(self, gold: str, answer: str, *, whole_texts: bool = False) -> str:
        """Return `equal`, `different`, `timeout` or `died` (the judge crashed on this answer, twice).

        With `whole_texts` the two are texts in which math-verify looks for answers itself, as evaluation harnesses
        have it do: the last number of any text will then pass for one.

        Any thread may call this; it waits for a free judge. Raises RuntimeError if none can be started or the
        pool is closed.
        """
        with self._slots:
            verdict = "died"
            for attempt in range(2):
                judge = self._take(fresh=attempt > 0)
                verdict = self._ask(judge, gold, answer, whole_texts)
                if verdict != "died":
                    break
        if verdict in ("timeout", "died"):
            logger.info("math-verify: %s on answer %.200r for ground truth %.200r", verdict, answer, gold)
        return verdict

    def _ask(self, judge: _Judge, gold: str, answer: str, whole_texts: bool) -> str:
        reusable = False
        try:
            verdict = judge.ask(gold, answer, whole_texts, self.limit_seconds * _WALL_PER_CPU_SECOND)
            reusable = True
            return verdict
        except TimeoutError:
            return "timeout"
        except (EOFError, OSError):
            return "timeout" if judge.process.wait() == -signal.SIGVTALRM else "died"
        finally:
            # Also on KeyboardInterrupt: a late reply would answer the next caller's question.
            self._give_back(judge, reusable)

    def _take(self, fresh: bool) -> _Judge:
        with self._lock:
            if self._closed:
                raise RuntimeError("the math-verify pool is closed")
            while self._idle and not fresh:
                judge = self._idle.pop()
                if judge.process.poll() is None:
                    self._busy.add(judge)
                    return judge
                judge.kill()  # it died while idle; this frees its pipe
        judge = _Judge(self.limit_seconds, self.memory_bytes)
        with self._lock:
            self._busy.add(judge)
        return judge

    def _give_back(self, judge: _Judge, reusable: bool) -> None:
        with self._lock:
            self._busy.discard(judge)
            if reusable and not self._closed:
                self._idle.append(judge)
                return
        judge.kill()

    def close(self) -> None:
        """Kill every judge, busy ones too. A closed pool stays closed."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for judge in idle:
            judge.kill()
        for judge in busy:
            judge.process.kill()  # its caller reads end of file, and cleans up


_default: JudgePool | None = None
_default_lock = threading.Lock()


def default_pool() -> JudgePool:
    """Return this process's pool, creating it on first use and closing it at exit."""
    global _default
    with _default_lock:
        if _default is None:
            _default = JudgePool()
            atexit.register(_default.close)
        return _default


def _forget_after_fork() -> None:
    """A forked child must not talk through its parent's pipes, nor inherit a lock that someone holds."""
    global _default, _default_lock
    if _default is not None:
        atexit.unregister(_default.close)
    _default = None
    _default_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
