"""The live display shows what it is told, whatever that is: it must not end a run."""

import io

from rich.console import Console

from ptl_rl.reporting.live import LiveDisplay


def test_a_note_is_shown_as_it_is():
    """A user's error may look like rich's markup, which raises where a closing tag has no opening one."""
    console = Console(file=io.StringIO(), width=80)
    LiveDisplay(console, "run", lambda planned: []).note("the reward function raised: no [/answer] in [bold]it")
    assert console.file.getvalue() == "the reward function raised: no [/answer] in [bold]it\n"
