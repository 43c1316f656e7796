"""The three processes behind `reward.programs.sandbox`: a judge, a confined program, and a referee as confined.

The judge forks the other two first and reads its request afterwards, so that no expected value was ever in the memory
of the process that runs the program. That process executes the program and then answers questions: it evaluates
calls and returns plain data (`reward.programs.values`). The referee knows the setup and the expected values, and holds
them against that data. The judge evaluates nothing and unpacks no value: it carries messages from one to the other,
watches both, and alone holds the pipe to the parent. Hence nothing that a program does to itself, an early exit
included, can report a success, and nothing that a test does to a returned value happens outside a confined process.

Requests and replies are JSON. Nothing is imported that costs time, for this starts once per program.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time

from reward.programs import limits
from reward.programs.channel import Channel, Ended
from reward.programs.confined import MESSAGE_CHARS, confine_process, referee, run_program

TYPE_CHECKING = False  # importing typing would cost a fifth of the child's start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_TICK_MILLISECONDS = 50
# What the judge itself reads of the program.
_LARGEST_REPORT = 2**12
_JUDGE_MEMORY_BYTES = 2**30
_REAP_SECONDS = 5.0
# The judge starts with no more than its standard ones.
_MOST_DESCRIPTORS = 256


class _Watched:
    """The judge's view of a confined process. All of its time ends at one moment, `deadline`."""

    def __init__(self, settings: dict[str, Any], serve: Callable[[Channel], None], deadline: float) -> None:
        self.folder = settings["folder"]
        self.most_threads = settings["threads"]
        self.most_files = settings["files"]
        self.cpu_seconds = settings["cpu_seconds"]
        self.deadline = deadline
        self.next_look = 0.0
        self.ended = False
        questions, replies = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _close_all_but(questions[0], replies[1])
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                channel = Channel(questions[0], replies[1])
                confine_process(channel, settings)
                serve(channel)
                status = 0
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)  # seen only as long as it is our own
            finally:
                os._exit(status)
        os.close(questions[0])
        os.close(replies[1])
        self.channel = Channel(replies[0], questions[1], self.wait)

    def ask(self, question: Any) -> Any:
        self.channel.send(question)
        return self.channel.receive()

    def wait(self, descriptor: int, event: int) -> None:
        """Return once `descriptor` is ready. A process that drips bytes is never waited for longer than another."""
        poll = select.poll()
        poll.register(descriptor, event)
        while True:
            ready = poll.poll(_TICK_MILLISECONDS)
            now = time.monotonic()
            if now > self.deadline:
                raise Ended("timeout")
            if now > self.next_look:
                self.next_look = now + _TICK_MILLISECONDS / 1000
                # Neither has a limit of its own that binds root, and files have none at all.
                if self.threads() > self.most_threads or len(os.listdir(self.folder)) > self.most_files:  # noqa: PTH208
                    raise Ended("excess")
            if ready:
                return

    def threads(self) -> int:
        try:
            return os.stat(f"/proc/{self.pid}/task").st_nlink - 2  # noqa: PTH116
        except OSError:  # /proc is hidden
            return 0

    def end(self, why: str) -> str:
        """Kill the process; return `why`, or `timeout` if it died because its time was up."""
        if not self.ended:
            self.ended = True
            os.kill(self.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self.pid, 0)
            # The kernel kills by a count of clock ticks, which on a busy machine runs far ahead of the time used.
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            if why == "died" and killed and usage.ru_utime + usage.ru_stime >= self.cpu_seconds / 4:
                return "timeout"
        return why


def _close_all_but(*kept: int) -> None:
    """Leave neither the judge's pipes nor those of the other process to one that it forks."""
    low = 3
    for descriptor in sorted(kept):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, _MOST_DESCRIPTORS)


def _reap_all() -> None:
    """Kill what a program left behind where seccomp did not hold; as their subreaper, the judge inherits them."""
    deadline = time.monotonic() + _REAP_SECONDS
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:  # noqa: PTH123
                for pid in file.read().split():
                    os.kill(int(pid), signal.SIGKILL)
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except (ChildProcessError, FileNotFoundError):
            return
        except ProcessLookupError:
            continue


class _Judge:
    """Both processes, and the verdict on one request."""

    def __init__(self, settings: dict[str, Any]) -> None:
        deadline = time.monotonic() + settings["wall_seconds"]
        # The first child is process 1 of its namespace, and takes the others with it when it ends.
        self.referee = _Watched(settings, referee, deadline)
        try:
            self.program = _Watched(settings, run_program, deadline)
        except BaseException:
            self.referee.end("died")
            raise

    def held(self) -> list[str]:
        """The layers that confine both."""
        theirs = self.program.channel.receive(_LARGEST_REPORT)
        return [layer for layer in self.referee.channel.receive() if layer in theirs]

    def end(self, why: str) -> str:
        """Kill both and all that may descend from them; say how the program ended, as far as it is to be blamed."""
        why = self.program.end(why)
        why = self.referee.end(why)
        _reap_all()
        return why

    def judge(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return `passed` (a bool per test), `ended` and `message` (the first error)."""
        passed = [False] * len(request["tests"])
        messages: list[str] = []
        verdict = {"passed": passed, "ended": "ok", "message": ""}
        try:
            self.program.channel.send({"before": request["before"]})  # meanwhile, the referee does the same and more
            broken = self.referee.ask({"setup": request["judge_setup"]}).get("error")
            if broken is not None:
                return verdict | {"ended": "setup", "message": str(broken)[:MESSAGE_CHARS]}
            setup = [[number, request["setup"][number]] for number in request["first"]]
            self.program.channel.send({"program": request["program"], "setup": setup})
            broken = self.program.channel.receive(_LARGEST_REPORT).get("error")
            if broken is not None:
                return verdict | {"ended": "error", "message": str(broken)[:MESSAGE_CHARS]}
            for number, test in enumerate(request["tests"]):
                passed[number] = self.passes(test, request["setup"], messages)
        except Ended as end:
            verdict["ended"] = str(end)
        except (AttributeError, TypeError, ValueError):  # a reply of another shape, written past its own channel
            verdict["ended"] = "died"
        return verdict | {"message": messages[0] if messages else ""}

    def passes(self, test: dict[str, Any], setup: list[str], messages: list[str]) -> bool:
        """Carry one test's inputs, calls and results between the two."""
        inputs = self.referee.ask({"inputs": test["inputs"]}) if test["inputs"] else []
        whole = test["whole"]
        needs = test["needs"] if whole or not all(plain for plain, _ in inputs) else []
        question = {"whole": whole, "calls": test["calls"], "inputs": inputs}
        self.program.channel.send(question | {"setup": [[number, setup[number]] for number in needs]})
        # Carried and not read: it is the program's.
        reply = self.program.channel.receive_raw()
        judge = "__value__(0) is True" if whole else test["judge"]
        self.referee.channel.send({"judge": judge, "names": test["inputs"]}, reply)
        right, message = self.referee.channel.receive()
        if right is not True:
            messages.append(str(message)[:MESSAGE_CHARS])
        return right is True


def _remove(folder: str) -> None:
    try:
        for name in os.listdir(folder):  # noqa: PTH208
            os.unlink(f"{folder}/{name}")  # noqa: PTH108
        os.rmdir(folder)  # noqa: PTH106
    except OSError:
        return  # the parent removes what is left


def _answer(judge: _Judge, namespaces: bool, settings: dict[str, Any]) -> None:
    """Tell the parent which layers hold, then the verdict on its one request."""
    held = judge.held() + (["namespaces"] if namespaces else [])
    request = json.loads(sys.stdin.buffer.read())
    needed = ["seccomp"] + ([] if {"landlock", "namespaces"} & set(held) else ["landlock or user namespaces"])
    missing = [layer for layer in needed if layer not in held]
    print(json.dumps({"token": request["token"], "held": held, "missing": missing}), flush=True)
    if not missing or settings["allow_weaker_limits"]:
        verdict = judge.judge(request)
        verdict["ended"] = judge.end(verdict["ended"])
        print(json.dumps({"token": request["token"], **verdict}), flush=True)


def main() -> None:
    """Judge the one request on stdin. Settings are the first argument, for the forks come before the request."""
    settings = json.loads(sys.argv[1])
    judge = None
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        namespaces = "namespaces" not in settings["without"] and limits.enter_namespaces()
        if limits.guard_judge(settings["parent"]):
            judge = _Judge(settings)
            limits.limit_resources(settings["cpu_seconds"] + 5, _JUDGE_MEMORY_BYTES, 2**20, 64)
            _answer(judge, namespaces, settings)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if judge is not None:
            judge.end("died")
        _remove(settings["folder"])
    os._exit(0)  # nothing is left to do, and the interpreter would take its time
