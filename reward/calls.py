"""Call a user's reward function in a process of its own, and never wait for it longer than its limit.

A function that never returns cannot be stopped in its own process: threads cannot be killed, and one that hangs in C
(a regular expression that backtracks) keeps the interpreter from every other thread. A function that changes the
folder, exits, or crashes would do so to verl's worker. Here it does all that to a child, which is replaced.

Calls run side by side in one child. When one of them takes too long or ends the child, all that were running are called
again, one at a time: what fails alone is itself to blame.
"""

import asyncio
import atexit
import concurrent.futures
import contextlib
import itertools
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from reward.guard import Guarded, Value
from reward.load import RewardError, read_source, text_of

CALL_SECONDS = 60.0
"""Limit of one call, unless a recipe says otherwise."""
_START_SECONDS = 300.0
# A child that can end a call by itself gets so much longer for it.
_GRACE_SECONDS = 2.0
# So many calls in a row hang alone; then those that hang with others are not tried alone.
_MOST_HUNG_ALONE = 4

_WORKER = str(Path(__file__).with_name("call_worker.py"))
# As in `reward.judge_pool`: our import path and nothing else.
_BOOT = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import json, runpy; "
    "sys.path[:] = json.loads(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='__main__')"
)


class CallStopped(Exception):
    """The call did not return: it took too long, or it ended its process."""


class CallGivenUp(CallStopped):
    """The call alone is over, and its process goes on."""


# Of the kinds of reply that are no result.
_ERRORS = {"refused": RewardError, "given up": CallGivenUp, "raised": CallStopped}


class FunctionProcess:
    """One child, with the function loaded. Any thread may call it."""

    def __init__(
        self, path: str | Path, name: str, keys: Mapping[str, str] | None = None, source: bytes | None = None
    ) -> None:
        """Load the function of `source`, which `path` had once; default: what it has now. Raises RewardError."""
        self.path = path
        source = read_source(path) if source is None else source
        self.connection, theirs = Pipe()
        settings = (theirs.fileno(), os.getpid(), str(path), name, None if keys is None else dict(keys))
        folders = [str(entry) for entry in sys.path if entry]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, _WORKER, json.dumps(folders), json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # so that what the function starts ends with it
        )
        theirs.close()
        _living.add(self)
        self.owner = os.getpid()
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        ready: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.waiting = {0: ready}
        self.gone = False
        self.latest = time.monotonic()
        self.unsent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.unsent.put(source)
        threading.Thread(target=self._write, name="reward-calls", daemon=True).start()
        threading.Thread(target=self._read, name="reward-replies", daemon=True).start()
        try:
            self.is_async = bool(ready.result(_START_SECONDS))
        except concurrent.futures.TimeoutError:
            self.kill()
            raise RewardError(f"importing reward file {path} took more than {_START_SECONDS:g} s: mend it") from None
        except CallStopped as error:
            self.kill()
            raise RewardError(f"importing reward file {path} {error}: mend the file") from None
        except BaseException:
            self.kill()
            raise

    def call(self, arguments: Mapping[str, Any], limit_seconds: float, *, is_trial: bool = False) -> dict[str, Value]:
        """Return the guarded result of one call. Raises CallStopped; after that the process must be killed.

        The limit counts from the latest result of any call: where many share a processor, each is slow, and none hangs.
        """
        future = self._begin(arguments, is_trial, limit_seconds)
        start = time.monotonic()
        while (left := max(start, self.latest) + limit_seconds - time.monotonic()) > 0:
            try:
                return future.result(left)
            except concurrent.futures.TimeoutError:
                continue
        raise CallStopped(f"did not return within {limit_seconds:g} s")

    async def call_async(self, arguments: Mapping[str, Any], limit_seconds: float) -> dict[str, Value]:
        """Do what `call` does, and hold no thread while it waits: asynchronous functions run by the thousand.

        The child gives up a call that waits too long by itself; it does not while another holds its event loop.
        """
        future = asyncio.wrap_future(self._begin(arguments, False, limit_seconds))
        # Of a call that is given up nobody asks for the result, and asyncio would complain of that.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        start = time.monotonic()
        longest = limit_seconds + _GRACE_SECONDS
        while (left := max(start, self.latest) + longest - time.monotonic()) > 0:
            if (await asyncio.wait([future], timeout=left))[0]:
                return future.result()
        raise CallStopped(f"did not return within {limit_seconds:g} s")

    def _begin(
        self, arguments: Mapping[str, Any], is_trial: bool, limit_seconds: float
    ) -> concurrent.futures.Future[dict[str, Value]]:
        future: concurrent.futures.Future[dict[str, Value]] = concurrent.futures.Future()
        number = next(self.numbers)
        try:  # for our own child process, which alone reads it; JSON has no arrays
            pickled = pickle.dumps(dict(arguments))
        except Exception as error:  # of many kinds, by what the arguments are
            raise CallGivenUp(f"cannot be handed over ({type(error).__name__}: {text_of(error)})") from None
        data = pickle.dumps((number, is_trial, limit_seconds, pickled))
        with self.lock:
            if self.gone:
                raise CallStopped("ended its process")
            self.waiting[number] = future
        self.unsent.put(data)
        return future

    def _write(self) -> None:
        """In a thread of its own, for a child that hangs takes nothing from its pipe."""
        try:
            while (data := self.unsent.get()) is not None:
                self.connection.send_bytes(data)
        except OSError:
            return  # the child has ended, as the other thread finds

    def _read(self) -> None:
        try:
            while True:
                number, kind, content = json.loads(self.connection.recv_bytes())
                future = self.waiting.pop(number)
                if kind in ("result", "ready"):
                    self.latest = time.monotonic()
                    future.set_result(content)
                else:
                    future.set_exception(_ERRORS[kind](content))
        except (EOFError, OSError, ValueError, KeyError):
            with self.lock:
                self.gone = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # for its own exit status
            self.kill()
            for future in list(self.waiting.values()):
                if not future.done():
                    reason = f"ended its process (exit status {self.process.returncode})"
                    future.set_exception(CallStopped(reason))

    def kill(self) -> None:
        """End the process and what it has started; calls that wait for it get CallStopped."""
        self.gone = True
        self.unsent.put(None)
        if self.owner != os.getpid():
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


_living: weakref.WeakSet[FunctionProcess] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A function that holds its interpreter would not see that its parent is gone."""
    for process in list(_living):
        process.kill()


class UserFunction:
    """A user's function behind the guard, as `reward.guard.guard` gives one, but in another process."""

    def __init__(
        self, path: str | Path, name: str, keys: Mapping[str, str] | None = None, limit_seconds: float = CALL_SECONDS
    ) -> None:
        """Raises RewardError if it cannot be loaded."""
        # Later children have the same, though the file may be edited by then.
        self.wanted = (path, name, keys, read_source(path))
        self.limit_seconds = limit_seconds
        self.guard = Guarded(None, f"{name} of {path}", keys)
        self.lock = threading.Lock()
        self.one_at_a_time = threading.Lock()
        self.together = FunctionProcess(*self.wanted)
        self.alone: FunctionProcess | None = None
        self.hung_alone = 0

    async def __call__(
        self, data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None, **kwargs: Any
    ) -> dict[str, Value]:
        """Return a dict with `score` and `reward_error`, whatever the function does."""
        sample = {"data_source": data_source, "solution_str": solution_str, "ground_truth": ground_truth}
        sample["extra_info"] = extra_info
        run_in_thread = asyncio.get_running_loop().run_in_executor
        try:
            process = await run_in_thread(None, self._running)
        except RewardError as error:  # it could be loaded before
            return self.guard.failure(error, sample, always=True)
        try:
            if process.is_async:
                return self._learnt(await process.call_async(sample | kwargs, self.limit_seconds))
            return self._learnt(await run_in_thread(None, process.call, sample | kwargs, self.limit_seconds))
        except CallGivenUp as error:
            return self.guard.failure(error, sample, always=True)
        except CallStopped as error:
            await run_in_thread(None, process.kill)
            return await run_in_thread(None, self._call_alone, sample, kwargs, error)

    def _call_alone(self, sample: dict[str, Any], kwargs: dict[str, Any], reason: CallStopped) -> dict[str, Value]:
        with self.one_at_a_time:
            if self.hung_alone >= _MOST_HUNG_ALONE:
                return self.guard.failure(reason, sample, always=True)
            try:
                if self.alone is None or self.alone.gone:
                    self.alone = FunctionProcess(*self.wanted)
                return self._learnt(self.alone.call(sample | kwargs, self.limit_seconds))
            except RewardError as error:
                return self.guard.failure(error, sample, always=True)
            except CallStopped as error:
                self.hung_alone += 1
                if self.alone is not None and not isinstance(error, CallGivenUp):
                    self.alone.kill()
                return self.guard.failure(error, sample, always=True)

    def _running(self) -> FunctionProcess:
        with self.lock:
            if self.together.gone:
                self.together = FunctionProcess(*self.wanted)
            return self.together

    def _learnt(self, result: dict[str, Value]) -> dict[str, Value]:
        self.hung_alone = 0
        if not result["reward_error"]:
            self.guard.learn(result)
        return result
