"""The journal keeps whole lines, drops one that a crash cut short, and refuses anything else."""

import pytest

from ptl_rl.driver.journal import Entry, Journal, JournalError, fingerprint


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


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\n", b'{"cycle": 1, "stage": "sc\xe9re"}\n', b"\0" * 40 + b"\n", b"[" * 3000 + b"\n", b"\n"]
)
def test_a_line_that_is_no_text_is_named(tmp_path, line):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Entry(cycle=0, stage="evaluate"))
    with journal.path.open("ab") as file:
        file.write(line)
    with pytest.raises(JournalError, match=r"journal\.jsonl:2: not a journal line"):
        journal.entries()


def test_bytes_that_a_crash_left_at_the_end_are_dropped(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Entry(cycle=0, stage="evaluate"))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b'{"cycle": 1\r\xff\0\0')
    assert len(journal.entries()) == 1 and journal.path.read_bytes() == whole


def test_a_fingerprint_changes_with_what_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(bytes(100))
    first = fingerprint(path)
    assert first == fingerprint(path)
    for place in range(100):
        content = bytearray(100)
        content[place] = 1
        path.write_bytes(content)
        assert fingerprint(path) != first
    monkeypatch.setattr("ptl_rl.driver.journal.WHOLE_BYTES", 99)
    monkeypatch.setattr("ptl_rl.driver.journal.PART_BYTES", 10)
    path.write_bytes(bytes(100))
    large = fingerprint(path)
    for content, same in [(bytes(101), False), (b"\1" + bytes(99), False), (bytes(99) + b"\1", False)]:
        path.write_bytes(content)
        assert (fingerprint(path) == large) == same
