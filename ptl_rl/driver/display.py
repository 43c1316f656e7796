"""What the driver tells of a run while it works: implemented in :mod:`ptl_rl.reporting.live`."""

from typing import Any, Protocol

from ptl_rl.driver.journal import Entry
from ptl_rl.driver.state import Stage, State


class Display(Protocol):
    """Called by the driver, in its own thread; must not raise."""

    def start(self, entries: list[Entry], state: State) -> None:
        """The driver begins, after these finished stages."""

    def stop(self) -> None:
        """The driver ends, whatever the reason; also called where ``start`` was not."""

    def note(self, text: str) -> None:
        """Something to tell the user, once."""

    def stage_started(self, stage: Stage, state: State) -> None:
        """A stage begins, or begins again."""

    def progress(self, done: int, total: int, metrics: dict[str, Any]) -> None:
        """Steps of the stage that is at work; ``done < 0``: nothing new, but time has passed."""

    def cut_made(self, entry: Entry) -> None:
        """A cut in place is journaled; the stage goes on."""

    def stage_finished(self, entry: Entry, state: State) -> None:
        """A stage is journaled; ``state`` is the one after it."""
