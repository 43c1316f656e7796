"""The child process that runs a user's reward function for `reward.calls`.

It is a script and not a `multiprocessing` target, so that it does not import the parent's main module. Calls come
pickled, as they may hold arrays, through a pipe whose other end the parent alone has: nothing from outside is
unpickled. The parent unpickles nothing, as replies are JSON: [number of the call, kind of reply, content]. Each call
runs in a thread, as verl would run it, or in one event loop if the function is asynchronous.
"""

import asyncio
import json
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from reward.check import attempt
from reward.guard import guard, is_async
from reward.load import RewardError, load_function, text_of

_PARENT_POLL_SECONDS = 1.0


class _Worker:
    def __init__(
        self, connection: Connection, path: str, name: str, keys: dict[str, str] | None, source: bytes
    ) -> None:
        self.connection = connection
        self.sending = threading.Lock()
        self.latest = 0.0
        self.label = f"reward function {name!r} of {path}"
        self.function = load_function(path, name, source)
        self.guarded = guard(self.function, name=f"{name} of {path}", keys=keys)
        self.loop = asyncio.new_event_loop()
        if is_async(self.function):
            threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def send(self, number: int, kind: str, content: Any) -> None:
        data = json.dumps([number, kind, content]).encode("ascii")
        with self.sending:
            self.connection.send_bytes(data)
        if kind == "result":
            self.latest = time.monotonic()

    def start(self, number: int, is_trial: bool, limit_seconds: float, pickled: bytes) -> None:
        try:
            arguments = pickle.loads(pickled)  # apart from what is around it: if this fails, the call alone is lost
        except BaseException as error:  # of classes that this process cannot import
            self.send(number, "given up", f"raised {type(error).__name__}: {text_of(error)}")
            return
        if is_async(self.function) and not is_trial:
            asyncio.run_coroutine_threadsafe(self.answer_async(number, arguments, limit_seconds), self.loop)
        else:
            threading.Thread(target=self.answer, args=(number, is_trial, arguments), daemon=True).start()

    async def answer_async(self, number: int, arguments: dict[str, Any], limit_seconds: float) -> None:
        call = asyncio.ensure_future(self.guarded(**arguments))
        start = time.monotonic()
        while (left := max(start, self.latest) + limit_seconds - time.monotonic()) > 0 and not call.done():
            await asyncio.wait([call], timeout=left)
        try:
            if call.done():
                self.send(number, "result", dict(call.result()))
            else:
                call.cancel()
                self.send(number, "given up", f"did not return within {limit_seconds:g} s")
        except BaseException as error:
            self.send(number, "raised", f"raised {type(error).__name__}: {text_of(error)}")

    def answer(self, number: int, is_trial: bool, arguments: dict[str, Any]) -> None:
        call: Callable[[], Any] = (lambda: self.trial(arguments)) if is_trial else (lambda: self.call(arguments))
        try:
            self.send(number, "result", call())
        except RewardError as error:
            self.send(number, "refused", str(error))
        except BaseException as error:  # KeyboardInterrupt, say, which the guard lets pass
            self.send(number, "raised", f"raised {type(error).__name__}: {text_of(error)}")

    def trial(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return attempt(self.function, self.label, arguments)

    def call(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return dict(self.guarded(**arguments))


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)


def main(descriptor: int, parent_pid: int, path: str, name: str, keys: dict[str, str] | None) -> None:
    """Load the function, say `ready` or why not, and answer calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us
    threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True).start()
    logging.basicConfig()
    connection = Connection(descriptor)
    try:
        worker = _Worker(connection, path, name, keys, connection.recv_bytes())
    except RewardError as error:
        connection.send_bytes(json.dumps([0, "refused", str(error)]).encode("ascii"))
        return
    worker.send(0, "ready", is_async(worker.function))
    try:
        while True:
            worker.start(*pickle.loads(connection.recv_bytes()))  # from the parent only
    except (EOFError, OSError):
        os._exit(0)  # threads of the user's may never end


if __name__ == "__main__":
    main(*json.loads(sys.argv[3]))
