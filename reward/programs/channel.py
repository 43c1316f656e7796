"""Messages between the judge and the confined processes. Nothing is imported that costs time."""

from __future__ import annotations

import json
import os
import select

TYPE_CHECKING = False  # importing typing would cost a fifth of the child's start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LARGEST_MESSAGE = 2**23


class Ended(Exception):
    """The program's process is no longer worth asking: `timeout`, `died`, or `excess` of threads or files."""


class Channel:
    """Messages behind their length. `wait` returns once one may go on, or raises; without it, reading just blocks."""

    def __init__(self, incoming: int, outgoing: int, wait: Callable[[int, int], None] | None = None) -> None:
        self.incoming = incoming
        self.outgoing = outgoing
        self.wait = wait
        if wait is not None:
            os.set_blocking(incoming, False)
            os.set_blocking(outgoing, False)

    def send(self, message: Any, raw: bytes = b"") -> None:
        data = json.dumps(message).encode("ascii")
        self.write(len(data).to_bytes(4, "big") + data + raw)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                if self.wait is not None:
                    self.wait(self.outgoing, select.POLLOUT)
                rest = rest[os.write(self.outgoing, rest) :]
        except BlockingIOError:  # less room than was said
            self.write(bytes(rest))
        except OSError as error:
            raise Ended("died") from error

    def receive(self, largest: int = LARGEST_MESSAGE) -> Any:
        try:
            return json.loads(self.receive_raw(largest)[4:])
        except (ValueError, RecursionError) as error:  # written by the program past its own channel
            raise Ended("died") from error

    def receive_raw(self, largest: int = LARGEST_MESSAGE) -> bytes:
        """A message as it came, its length included."""
        head = self.read(4)
        length = int.from_bytes(head, "big")
        if length > largest:
            raise Ended("died")
        return head + self.read(length)

    def read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            if self.wait is not None:
                self.wait(self.incoming, select.POLLIN)
            piece = os.read(self.incoming, count - len(data))
            if not piece:
                raise Ended("died")
            data += piece
        return bytes(data)
