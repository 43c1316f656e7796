"""Largest memory within a stretch of code."""

import threading

import psutil
import torch

MIB = 2**20


class PeakMemory:
    """Largest memory of this process within the context, above what it was at its start.

    Pages of mapped files are not counted: the kernel drops them when it needs the memory.
    """

    def __enter__(self) -> "PeakMemory":
        self.process, self.stopped = psutil.Process(), threading.Event()
        self.start = self.peak = self._now()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _now(self) -> int:
        info = self.process.memory_info()
        return info.rss - info.shared

    def _watch(self) -> None:
        while not self.stopped.wait(0.005):
            self.peak = max(self.peak, self._now())

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    @property
    def added_mib(self) -> float:
        return (self.peak - self.start) / MIB


class PeakGpuMemory:
    """Largest memory that torch has allocated on the GPU within the context, above what it held at its start."""

    def __enter__(self) -> "PeakGpuMemory":
        torch.cuda.reset_peak_memory_stats()
        self.start = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = torch.cuda.max_memory_allocated()

    @property
    def added_mib(self) -> float:
        return (self.peak - self.start) / MIB
