"""Run a policy's program against unit tests, in limited processes, from any thread.

The parent neither executes nor even parses the program: it starts `reward.programs.child`, hands it the request and
waits. Every program gets processes and a folder of its own, which are gone when the call returns. That costs tens
of milliseconds, which is less than a warm server would be worth: a server has to be kept clean.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

from reward.programs.seccomp import compile_filters
from reward.programs.unit_tests import Plan

# The child gets the folder of this package for as long as it imports, and no other path beside the standard library.
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from reward.programs.child import main; sys.path.pop(0); main()"
)
_ROOT = str(Path(__file__).resolve().parents[2])
# On top of `wall_seconds`, for the judge to start and to end by itself.
_GRACE_SECONDS = 20.0
_END_SECONDS = 2.0


class Limits(NamedTuple):
    """What one program may use: seconds of processor and wall-clock time, MiB, and counts."""

    cpu_seconds: int = 4
    wall_seconds: float = 12.0
    memory_mib: int = 512
    file_mib: int = 1
    files: int = 32
    threads: int = 32


class Outcome(NamedTuple):
    """`passed` has a bool per test; `ended` says how the program's process did.

    `ok`; `error`: the program itself raised; `timeout`; `died`: it exited, crashed or was killed; `excess`: too many
    threads or files. `message` is the first error, in the program's words: for people, not for decisions. `held`
    names the layers that confined it: `seccomp`, `landlock`, `namespaces`.
    """

    passed: tuple[bool, ...]
    ended: str
    message: str
    held: tuple[str, ...]


class Sandbox:
    """At most `workers` programs at a time (default: the processors this process may use); others wait.

    `allow_weaker_limits` runs programs even where the kernel has neither seccomp nor, for what seccomp cannot see,
    Landlock or user namespaces. `without` leaves layers out, to try a weaker machine.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        allow_weaker_limits: bool = False,
        without: tuple[str, ...] = (),
    ) -> None:
        if not sys.platform.startswith("linux"):
            raise RuntimeError(f"the code reward confines programs by means of Linux, and this is {sys.platform}")
        self.limits = limits or Limits()
        wrong = [name for name, value in self.limits._asdict().items() if not value > 0]
        if wrong or not isinstance(self.limits.cpu_seconds, int):
            raise ValueError(f"limits must be positive, and cpu_seconds a whole number: {self.limits}")
        self.allow_weaker_limits = allow_weaker_limits
        self.without = without
        self._filters = [[program.hex() for program in compile_filters(writable)] for writable in (False, True)]
        self._slots = threading.BoundedSemaphore(workers or len(os.sched_getaffinity(0)))

    def run(self, program: str, plan: Plan) -> Outcome:
        """Execute `program`, then the setup and the tests of `plan`. Any thread may call this.

        Raises RuntimeError if the processes cannot be started, or cannot be confined here, and ValueError if the part
        of the setup that needs no program fails.
        """
        tests = [test._asdict() for test in plan.tests]
        request = {"program": program, **plan._asdict(), "tests": tests}
        with self._slots:
            folder = tempfile.mkdtemp(prefix="ptl-code-")
            try:
                return self._run(request, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _run(self, request: dict[str, Any], folder: str) -> Outcome:
        token = secrets.token_hex(16)
        command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _BOOT, _ROOT, json.dumps(self._settings(folder))]
        # No secrets; and one arena, because glibc would reserve 64 MiB of address space for every thread.
        environment = {"MALLOC_ARENA_MAX": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env=environment,
            close_fds=True,
            start_new_session=True,
        )
        try:
            text = json.dumps(request | {"token": token}).encode("ascii")
            output, errors = process.communicate(text, timeout=self.limits.wall_seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            output, errors = self._end(process), b""
        except BaseException:
            self._end(process)
            raise
        return self._outcome(output, errors, token, process.returncode, len(request["tests"]))

    def _settings(self, folder: str) -> dict[str, Any]:
        settings: dict[str, Any] = self.limits._asdict()
        settings["memory_bytes"] = settings.pop("memory_mib") * 2**20
        settings["file_bytes"] = settings.pop("file_mib") * 2**20
        settings |= {"folder": folder, "open_files": 64, "parent": os.getpid(), "without": list(self.without)}
        return settings | {"allow_weaker_limits": self.allow_weaker_limits, "filters": self._filters}

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> bytes:
        """Let the judge clean up, then kill its whole group, and return what it had said."""
        process.terminate()
        try:
            return process.communicate(timeout=_END_SECONDS)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()[0]

    def _outcome(self, output: bytes, errors: bytes, token: str, status: int, tests: int) -> Outcome:
        replies = [json.loads(line) for line in output.splitlines()]
        replies = [reply for reply in replies if reply.get("token") == token]
        if not replies:
            raise RuntimeError(
                f"the processes of the code reward did not start (exit status {status}, {sys.executable}): "
                f"{errors.decode(errors='replace')[-500:] or 'no message'}"
            )
        held = tuple(replies[0]["held"])
        if replies[0]["missing"] and not self.allow_weaker_limits:
            raise RuntimeError(
                f"this machine has no {', no '.join(replies[0]['missing'])}: programs of a policy cannot be confined. "
                "Run on a kernel or container that allows it, or set allow_weaker_limits at your own risk"
            )
        if len(replies) == 1:  # the judge itself ran out of time or memory over the results
            return Outcome((False,) * tests, "timeout" if status < 0 else "died", "the judge was stopped", held)
        verdict = replies[1]
        if verdict["ended"] == "setup":
            raise ValueError(
                f"the setup of the ground truth fails by itself ({verdict['message']}): mend it; tests have the "
                "standard library only"
            )
        return Outcome(tuple(verdict["passed"]), verdict["ended"], verdict["message"], held)
