"""A stream of any length, compressed in blocks by several threads and cut into parts of a bounded size.

Every block is an xz stream of its own, so ``cat part-* | xz -dc`` is the whole. Much of a GPU stack is GPU code that is
compressed already: such a block is stored, which xz's format has chunks for, instead of spending minutes on a percent.
"""

import hashlib
import lzma
import struct
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 16 << 20
SAMPLE_BYTES, SAMPLE_EVERY_BYTES = 1 << 16, 1 << 20
STORED_ABOVE = 0.97  # A block that zlib's fastest level leaves larger than this is stored.


class PartWriter:
    """Writes bytes to files ``part-0001``, ... of at most ``part_bytes`` each; ``sums`` has their SHA-256."""

    def __init__(self, folder: Path, part_bytes: int) -> None:
        self.folder, self.part_bytes = folder, part_bytes
        self.sums: dict[str, str] = {}
        self._file, self._room = None, 0

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if not self._room:
                self._next()
            piece, view = view[: self._room], view[self._room :]
            self._file.write(piece)
            self._hash.update(piece)
            self._room -= len(piece)

    def _next(self) -> None:
        self.close()
        self._name = f"part-{len(self.sums) + 1:04d}"
        self._file = (self.folder / self._name).open("wb")
        self._hash, self._room = hashlib.sha256(), self.part_bytes

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self.sums[self._name] = self._hash.hexdigest()
            self._file = None


class Compressor:
    """A file to write to: compresses blocks in ``threads`` threads, and hands them to ``out`` in order."""

    def __init__(self, out: PartWriter, preset: int | None, threads: int) -> None:
        self.out, self.preset, self.threads = out, preset, threads
        self.read_bytes = 0
        self._pool = ThreadPoolExecutor(threads)
        self._waiting: deque[Future[bytes]] = deque()
        self._block = bytearray()

    def write(self, data: bytes) -> int:
        self.read_bytes += len(data)
        self._block += data
        while len(self._block) >= BLOCK_BYTES:
            self._submit(bytes(self._block[:BLOCK_BYTES]))
            del self._block[:BLOCK_BYTES]
        return len(data)

    def _submit(self, block: bytes) -> None:
        self._waiting.append(self._pool.submit(compress, block, self.preset))
        # One block waits for each thread, so that memory stays small whatever the length.
        while len(self._waiting) > 2 * self.threads:
            self.out.write(self._waiting.popleft().result())

    def close(self) -> None:
        if self._block:
            self._submit(bytes(self._block))
            self._block.clear()
        while self._waiting:
            self.out.write(self._waiting.popleft().result())
        self._pool.shutdown()
        self.out.close()


def compress(block: bytes, preset: int | None) -> bytes:
    """One xz stream, with the filter for x86 machine code; stored where that is no use, or without a ``preset``."""
    if preset is None or _is_compressed(block):
        return stored_stream(block)
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": preset}]
    return lzma.compress(block, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


def _is_compressed(block: bytes) -> bool:
    if len(block) < SAMPLE_BYTES:
        return False
    sample = b"".join(block[at : at + SAMPLE_BYTES] for at in range(0, len(block), SAMPLE_EVERY_BYTES))
    return len(zlib.compress(sample, 1)) > STORED_ABOVE * len(sample)


def stored_stream(block: bytes) -> bytes:
    """An xz stream that holds ``block`` in LZMA2's uncompressed chunks (The .xz File Format 1.2, sections 2 to 4)."""

    def with_crc(data: bytes) -> bytes:
        return data + struct.pack("<I", zlib.crc32(data))

    def integer(value: int) -> bytes:
        coded = bytearray()
        while value >= 0x80:
            coded.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*coded, value])

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    flags = b"\0\1"  # CRC32 is the check
    header = with_crc(padded(bytes([2, 0, 0x21, 1, 0])))  # 12 bytes in all; LZMA2 with a dictionary of 4 KiB
    chunks = []
    for at in range(0, len(block), 1 << 16):
        piece = block[at : at + (1 << 16)]
        chunks.append(bytes([1 if at == 0 else 2]) + struct.pack(">H", len(piece) - 1) + piece)
    body = b"".join(chunks) + b"\0"
    unpadded = len(header) + len(body) + 4
    index = with_crc(padded(b"\0" + integer(1) + integer(unpadded) + integer(len(block))))
    backward = struct.pack("<I", len(index) // 4 - 1) + flags
    footer = struct.pack("<I", zlib.crc32(backward)) + backward + b"YZ"
    start = b"\xfd7zXZ\0" + with_crc(flags)
    return b"".join([start, header, padded(body), struct.pack("<I", zlib.crc32(block)), index, footer])
