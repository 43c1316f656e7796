"""The run's one live display: what is going on now, how far it is, and what came out so far.

On a terminal it redraws itself; elsewhere (a log file, ``ray job logs``) it prints a line per event.
"""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ptl_rl.driver.journal import Entry
from ptl_rl.driver.state import Stage, State
from ptl_rl.reporting.eta import StageProgress, remaining_seconds
from ptl_rl.reporting.summary import left_by, rows, table

VERBS = {
    "score": "scoring",
    "slice": "slicing",
    "recover": "recovering",
    "evaluate": "evaluating",
    "gate": "gate",
}
SHOWN = (
    "reward",
    "loss",
    "parent_kl",
    "distillation_loss",
    "validation_accuracy",
    "intermediate_size",
    "damage",
    "patience_left",
    "learnable_fraction",
    "response_tokens",
    "kl",
    "tokens_per_second",
    "step_seconds",
)


def _time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class LiveDisplay:
    """The driver's :class:`~ptl_rl.driver.display.Display`; knows nothing of processes."""

    def __init__(self, console: Console, title: str, recoveries: Callable[[int, bool], list[tuple[str, int]]]) -> None:
        """``recoveries`` gives method and steps of what follows a planned cut, also where rewards taught nothing."""
        self.console, self.title, self.recoveries = console, title, recoveries
        self.entries: list[Entry] = []
        self.state: State | None = None
        self.stage: Stage | None = None
        self.stage_start = time.monotonic()
        self.now = StageProgress()
        self.live: Live | None = None
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[steps]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
        )
        self.task = self.bar.add_task("starting", total=None, steps="", metrics="")

    def start(self, entries: list[Entry], state: State) -> None:
        self.entries, self.state = list(entries), state
        self.bar.update(self.task, description="starting Ray")
        if self.console.is_terminal:
            self.live = Live(self._render(), console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        elif entries:
            finished = sum(entry.stage != "cut" for entry in entries)
            self.console.print(f"{self.title}: continuing after {finished} finished stages")

    def stop(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def stage_started(self, stage: Stage, state: State) -> None:
        self.stage, self.state, self.stage_start = stage, state, time.monotonic()
        self.now = StageProgress()
        self.bar.reset(self.task, total=None, steps="", metrics="", description=self._where(stage))
        self._refresh()

    def progress(self, done: int, total: int, metrics: dict[str, Any]) -> None:
        """``done < 0`` only redraws."""
        if done < 0:
            self._refresh()
            return
        self.now.done = done
        if "step_seconds" in metrics:
            self.now.step_seconds.append(metrics["step_seconds"])
        shown = ", ".join(f"{k.replace('_', ' ')} {metrics[k]:.3g}" for k in SHOWN if k in metrics)
        self.bar.update(self.task, completed=done, total=total, steps=f"{done}/{total}", metrics=shown)
        if not self.live and self.stage and self.stage.name == "recover":
            eta = self.eta_seconds()
            left = f", about {_time(eta)} left" if eta else ""
            self.console.print(f"{self._where(self.stage)}: step {done}/{total}, {shown}{left}", highlight=False)
        self._refresh()

    def cut_made(self, entry: Entry) -> None:
        m = entry.metrics
        layers = next((e.metrics["num_hidden_layers"] for e in self.entries if e.stage == "evaluate"), 0)
        (left,) = left_by([m], layers)
        self.note(
            f"cycle {entry.cycle}, cut {entry.part + 1} after step {m['after_step']}: {left} channels left, loss "
            f"{m['loss_before']:.3f}, then {m['loss_after']:.3f} ({_time(m['cut_seconds'])})"
        )

    def stage_finished(self, entry: Entry, state: State) -> None:
        self.entries.append(entry)
        self.state = state
        if not self.live:
            self.console.print(f"{self.title}: {self._outcome(entry)}", highlight=False)
        for text in entry.metrics.get("notes") or []:
            self.note(f"cycle {entry.cycle}: {text}")
        self._refresh()

    def _recovering(self, stage: Stage) -> str:
        """The method at work."""
        assert self.state
        method, _ = self.recoveries(self.state.cuts[0].planned, self.state.is_rescuing)[stage.part]
        return method.upper()

    def _where(self, stage: Stage) -> str:
        if stage.cycle == 0:
            return "original model: evaluating"
        total = stage.cycle - 1 + len(self.state.cuts) if self.state else stage.cycle
        extra = ""
        if stage.name == "recover" and self.state:
            extra = f" ({self._recovering(stage)})"
        extra += f", round {stage.round + 1}" if stage.round else ""
        return f"cycle {stage.cycle}/{total}: {VERBS[stage.name]}{extra}"

    def _outcome(self, entry: Entry) -> str:
        m, where = entry.metrics, f"cycle {entry.cycle} {entry.stage}"
        if entry.stage == "evaluate":
            return f"{where}: accuracy {m['accuracy']:.1%}, {m['parameters']:,} parameters ({_time(entry.seconds)})"
        if entry.stage == "gate":
            kept = f"{m['ratio']:.3f} of the original accuracy" if m["baseline"] else "the original solves nothing"
            return f"{where}: {m['decision']} ({kept})"
        if entry.stage == "slice":
            return (
                f"{where}: {m['num_hidden_layers']} layers x {m['intermediate_size']} channels ({_time(entry.seconds)})"
            )
        if entry.stage == "recover":
            where += f" ({entry.metrics.get('method', 'grpo')})"
        return f"{where}: done ({_time(entry.seconds)})"

    def eta_seconds(self) -> float | None:
        """Remaining time of the run; see :func:`ptl_rl.reporting.eta.remaining_seconds`."""
        if self.state is None or self.stage is None:
            return None
        self.now.elapsed_seconds = time.monotonic() - self.stage_start
        return remaining_seconds(self.entries, self.state, self.stage, self.now, self.recoveries)

    def _render(self) -> Group:
        eta = self.eta_seconds()
        head = f"[bold]{self.title}[/bold]  " + (f"about {_time(eta)} left" if eta else "")
        parts: list[Any] = [head]
        if any(e.stage == "evaluate" for e in self.entries):
            parts.append(table(rows(self.entries)))
        return Group(*parts, self.bar)

    def _refresh(self) -> None:
        if self.live:
            self.live.update(self._render())
