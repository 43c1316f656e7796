"""Stages that stall or fail, and a disk that fills up: a sentence, no process is left, and the run resumes."""

import errno
import os
from pathlib import Path

import pytest
from driven_runs import HURRY, Told, labels_of

from ptl_rl.driver import loop
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.driver.loop import Driver, StageFailed
from ptl_rl.driver.state import stage_of


def test_a_stalled_stage_is_ended_and_started_again(make_driven):
    run, left = make_driven(), []
    run.act({"001-recover.1": "stall"})
    told = Told(on_note=lambda text: left.extend(run.processes()))
    run.drive(told)
    assert left == []  # before the second start, the process of its own session included
    log = run.folder.logs / "001-recover.1.log"
    assert told.notes == [
        f"001-recover: no progress for 1.5 s (watchdog.stall_seconds); starting it again (log: {log})"
    ]
    run.check_complete()
    assert [run.starts(label) for label in labels_of(1)] == [1, 1, 1, 2, 1, 0]
    assert '"went_on": true' in (run.path / "cycles/001/recovered/config.json").read_text()  # from its own checkpoint


def test_a_stage_that_stalls_in_every_attempt_ends_the_run_which_resumes(make_driven):
    watchdog = {"startup_seconds": 3 * HURRY, "stall_seconds": 3 * HURRY // 2, "attempts": 2}
    run = make_driven(watchdog=watchdog)
    run.act({"001-slice.1": "stall", "001-slice.2": "silence"})
    with pytest.raises(StageFailed) as failure:
        run.drive()
    log = run.folder.logs / "001-slice.2.log"
    assert str(failure.value).splitlines() == [
        "stage 001-slice was ended: no progress for 3.0 s (watchdog.startup_seconds): "
        f"{log.read_text().splitlines()[-1]}",
        f"  log: {log}",
        f"  finished stages are kept; continue with: ptl resume {run.path}",
    ]
    assert run.processes() == [] and run.labels() == labels_of(1)[:2]
    run.act({})
    run.drive()
    run.check_complete()
    assert [run.starts(label) for label in labels_of(1)] == [1, 1, 3, 1, 1, 0]


@pytest.mark.parametrize(
    ("act", "what", "reason"),
    [
        ("raise", "failed (exit status 1)", "RuntimeError: planted: no rows left"),
        ("status 3", "failed (exit status 3)", "001-slice.1 is at work"),  # whatever it has written
        ("no result", "failed (exit status 0)", "001-slice.1 is at work"),
        (
            "cut short",
            "a result that cannot be read (RUN/logs/001-slice.1.result.json)",
            "001-slice.1 is at work",
        ),
        ("no files", "ended without writing it", "RUN/cycles/001/.sliced.tmp/config.json"),
    ],
)
def test_a_stage_that_fails_is_named_with_reason_log_and_what_to_do(make_driven, act, what, reason):
    run = make_driven()
    run.act({"001-slice": act})
    with pytest.raises(StageFailed) as failure:
        run.drive()
    first, *others = str(failure.value).replace(str(run.path), "RUN").splitlines()
    assert first.startswith("stage 001-slice ") and what in first and reason in first
    assert others == ["  log: RUN/logs/001-slice.1.log", "  finished stages are kept; continue with: ptl resume RUN"]
    assert run.labels() == labels_of(1)[:2] and run.processes() == []
    assert run.starts("001-slice") == 1  # one that fails is not started again
    run.act({})
    run.drive()
    run.check_complete()
    assert [run.starts(label) for label in labels_of(1)] == [1, 1, 2, 1, 1, 0]


def no_space(path: Path) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def fill_at_write(patch, name: str) -> None:
    """Every text file of that name is cut to nothing, as opening it does, and then finds no room."""
    write = Path.write_text

    def no_room(path: Path, text: str, *others, **options) -> int:
        if path.name == name:
            write(path, "")
            raise no_space(path)
        return write(path, text, *others, **options)

    patch.setattr(Path, "write_text", no_room)


def fill_at_rename(patch, name: str) -> None:
    rename = Path.rename

    def no_room(path: Path, target: Path) -> Path:
        if path.name == name:
            raise no_space(target)
        return rename(path, target)

    patch.setattr(Path, "rename", no_room)


def fill_at_journal(patch, label: str) -> None:
    """Half of the stage's line is written."""
    append = Journal.append

    def no_room(journal: Journal, entry: Entry) -> Entry:
        if stage_of(entry).label != label:
            return append(journal, entry)
        with journal.path.open("a") as file:
            file.write(entry.model_dump_json()[:40])
        raise no_space(journal.path)

    patch.setattr(Journal, "append", no_room)


def fill_at_link(patch, name: str) -> None:
    link = Path.symlink_to

    def no_room(path: Path, target: str) -> None:
        if path.name == name:
            raise no_space(path)
        link(path, target)

    patch.setattr(Path, "symlink_to", no_room)


@pytest.mark.parametrize(
    ("fill", "what", "done"),
    [
        (fill_at_write, ".owner.tmp", 0),
        (fill_at_write, "000-evaluate.1.spec.json", 0),
        (fill_at_rename, ".sliced.tmp", 2),
        (fill_at_journal, "001-recover", 3),
        (fill_at_journal, "001-gate", 5),
        (fill_at_write, ".manifest.tmp", 6),
        (fill_at_link, ".best.tmp", 6),
    ],
)
def test_a_full_disk_leaves_a_run_that_resumes(make_driven, monkeypatch, fill, what, done):
    run = make_driven()
    with monkeypatch.context() as patch:
        fill(patch, what)
        with pytest.raises(OSError, match="No space left on device") as error:
            run.drive()
        assert error.value.errno == errno.ENOSPC
    assert run.processes() == []
    finished = list(run.specs())[:done]
    run.drive()
    run.check_complete()
    assert all(run.starts(label.removesuffix(".1")) == 1 for label in finished)


WHOLE = b'{"run_id":"0123456789abcdef0123456789abcdef","since":1.5}'


@pytest.mark.parametrize(
    "content",
    [WHOLE[:n] for n in (0, 1, 9, 20, 45, 55)]
    + [b"null", b"[]", b"{}", b'"x"', b"7", b"\0" * 60, b"\xff\xfe", b'{"run_id": "x", "since": 1}']
    + [b'{"run_id": "0123456789abcdef0123456789abcdef"}', WHOLE.replace(b"1.5", b'"x"'), b"[" * 3000],
)
def test_an_owner_that_says_nothing_keeps_no_run_from_going_on(make_driven, monkeypatch, content):
    run, ended = make_driven(), []
    monkeypatch.setattr(loop, "end_processes", lambda name, value, grace_seconds: ended.append(value))
    monkeypatch.setattr(loop, "remove_orphaned_segments", lambda since: ended.append(since))
    driver = Driver(run.folder, lambda _: Told())
    owner = run.path / ".owner"
    owner.write_bytes(content)
    driver._clean_up_after_earlier_driver()
    assert ended == []
    driver._save_owner()
    driver._clean_up_after_earlier_driver()
    assert ended[0] == driver.run_id and len(ended) == 2
    assert not list(run.path.glob(".owner.*"))
