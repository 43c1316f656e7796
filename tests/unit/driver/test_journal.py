"""The journal keeps whole lines, drops one that a crash cut short, and refuses anything else."""

import pytest

from ptl_rl.driver.journal import Entry, Journal, JournalError


def test_entries_survive_in_order(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.entries() == []
    journal.append(Entry(cycle=0, stage="evaluate", metrics={"accuracy": 0.5}))
    journal.append(Entry(cycle=1, stage="score", artefact="cycles/001/scores", seconds=2.5))
    entries = journal.entries()
    assert [(e.cycle, e.stage) for e in entries] == [(0, "evaluate"), (1, "score")]
    assert entries[0].time > 0 and entries[1].seconds == 2.5


def test_line_cut_short_is_dropped_and_the_next_one_is_whole(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Entry(cycle=0, stage="evaluate"))
    with journal.path.open("a") as file:
        file.write('{"cycle": 1, "stage": "sco')
    assert len(journal.entries()) == 1
    journal.append(Entry(cycle=1, stage="score"))
    assert [e.stage for e in journal.entries()] == ["evaluate", "score"]


def test_damaged_line_is_named(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Entry(cycle=0, stage="evaluate"))
    journal.path.write_text(journal.path.read_text() + "garbage\n")
    with pytest.raises(JournalError, match=r"journal\.jsonl:2: not a journal line"):
        journal.entries()
