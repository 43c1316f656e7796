"""verl's trainers block the stage's process; a thread turns what they log into the stage's progress meanwhile."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptl_rl.stage import NewLines, StageContext

POLL_SECONDS = 0.2


class MetricsFollower(threading.Thread):
    """Reads the lines of verl's metrics file as they come.

    Args:
        select: from what verl logs at a step to metrics under our names.
        timed: add the seconds since the line before, where verl does not measure a step.
        counts: whether a step's seconds are its own; not where a cut came before it, say.
    """

    def __init__(
        self,
        context: StageContext,
        path: Path,
        select: Callable[[dict[str, Any]], dict[str, float]],
        timed: bool = False,
        counts: Callable[[int], bool] = lambda step: True,
    ) -> None:
        super().__init__(daemon=True)
        self.context, self.path, self.select, self.timed = context, path, select, timed
        self.counts = counts
        self.steps: dict[int, dict[str, float]] = {}
        self._seen: set[int] = set()
        self._last: float | None = None
        self._stop_asked = threading.Event()
        self._new = NewLines(path)
        self._earlier = path.with_name(f"earlier-{path.name}")
        self._keep_earlier()

    def again(self) -> "MetricsFollower":
        """Of the next attempt in the same stage, with all that this one has seen."""
        found = MetricsFollower(self.context, self.path, self.select, self.timed, self.counts)
        found.steps = {**found.steps, **self.steps}  # seconds that were measured here stand in no line
        return found

    def _keep_earlier(self) -> None:
        """verl empties its file when it goes on from a checkpoint, so what a killed attempt logged is put aside."""
        if self.path.exists():
            logged = self.path.read_bytes()
            with self._earlier.open("ab") as file:
                file.write(logged[: logged.rfind(b"\n") + 1])  # the last line may have been cut short
            self.path.unlink()
        if self._earlier.exists():
            for line in self._earlier.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # by an attempt that was killed here
                    continue
                self.steps.setdefault(int(row["step"]), {}).update(self.select(row["data"]))

    def _poll(self) -> None:
        for row in self._new.read():
            step, metrics = int(row["step"]), self.select(row["data"])
            if self.timed:
                self._time(step, metrics)
            if step not in self._seen:  # what a killed attempt has logged of it is not this attempt's
                self._seen.add(step)
                self.steps[step] = {}
            self.steps[step].update(metrics)
            self.context.report(step, self.context.spec.steps, **metrics)

    def _time(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if self._last is not None and self.counts(step):  # the first step's includes the start
            metrics["step_seconds"] = now - self._last
            if "tokens" in metrics and now > self._last:
                metrics["tokens_per_second"] = metrics["tokens"] / (now - self._last)
        self._last = now

    @property
    def curve(self) -> list[dict[str, float]]:
        """What was logged, by step."""
        return [{"step": step, **values} for step, values in sorted(self.steps.items())]

    def gap(self, made: int | None = None) -> list[str]:
        """A note if steps were made that nobody logged: verl saves before it logs, and may be killed in between.

        Args:
            made: steps of the training, where they may be fewer than it was allowed.
        """
        made = self.context.spec.steps if made is None else made
        missing = sorted(set(range(1, made + 1)) - self.steps.keys())
        if not missing:
            return []
        steps = ", ".join(map(str, missing))
        return [f"the curve lacks step {steps}: it was made and saved, but the attempt was killed before it was logged"]

    def save(self, path: Path) -> None:
        """Write all that verl has logged, by killed attempts, too, whose steps may have been made again."""
        with path.open("wb") as file:
            for part in (self._earlier, self.path):
                if part.exists():
                    file.write(part.read_bytes())

    def run(self) -> None:
        while not self._stop_asked.wait(POLL_SECONDS):
            self._poll()

    def finish(self) -> None:
        """Read what is left and end."""
        self._stop_asked.set()
        self.join()
        self._poll()
