"""A driver that SIGKILL ends at the worst instants, or Ctrl-C: the run resumes, and no process is left."""

import os
import signal

import pytest
from driven_runs import PATIENCE, drive_until_killed, labels_of, resume_command, start_child, wait_until

LABELS = labels_of(1)


def test_what_the_journal_does_not_name_is_made_again(make_driven):
    """Killed when a stage's folder has its name, but not yet its line in the journal; also just before the name."""
    run = make_driven()
    kept = b""
    for done, label in enumerate(LABELS):
        for when in ("rename", "line") if label in ("001-slice", "001-recover") else ("line",):
            child = start_child(drive_until_killed, run.path, when, label)
            child.join(PATIENCE)
            assert child.exitcode == -signal.SIGKILL
            assert run.labels() == LABELS[:done]
            journal = run.journal.path.read_bytes() if done else b""
            assert journal.startswith(kept)  # written once, never touched
            kept = journal
    run.drive()
    run.check_complete()
    assert run.journal.path.read_bytes().startswith(kept)
    assert [run.starts(label) for label in LABELS] == [2, 2, 3, 3, 2, 0]


def test_what_the_journal_names_is_not_made_again(make_driven):
    """Killed right after each line, before anything is tidied up."""
    run = make_driven()
    for done, label in enumerate(LABELS, 1):
        child = start_child(drive_until_killed, run.path, "after", label)
        child.join(PATIENCE)
        assert child.exitcode == -signal.SIGKILL
        assert run.labels() == LABELS[:done]
        if label == "001-recover":
            assert (run.path / "cycles/001/.recovered.work").exists()
    journal = run.journal.path.read_bytes()
    run.drive()
    run.check_complete()
    assert run.journal.path.read_bytes() == journal
    assert [run.starts(label) for label in LABELS] == [1, 1, 1, 1, 1, 0]


def test_a_killed_drivers_stage_is_ended_before_it_is_made_again(make_driven):
    run = make_driven()
    run.act({"001-recover.1": "stall"})
    child = start_child(drive_until_killed, run.path, "never", "none")
    wait_until((run.folder.logs / "001-recover.1.progress.jsonl").exists, child)
    child.kill()
    child.join(PATIENCE)
    left = run.processes()
    assert len(left) == 2  # the stand-in does not end with its driver; nor does a process in a session of its own
    run.drive()
    assert not any(process.is_running() for process in left)
    run.check_complete()
    assert [run.starts(label) for label in LABELS] == [1, 1, 1, 2, 1, 0]
    assert '"went_on": true' in (run.path / "cycles/001/recovered/config.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_a_stage_leaves_a_run_that_resumes_and_no_process(make_driven, tmp_path, number):
    run, said = make_driven(), tmp_path / "said"
    run.act({"001-slice.1": "stall"})
    child = start_child(resume_command, run.path, said)
    wait_until((run.folder.logs / "001-slice.1.progress.jsonl").exists, child)
    at_work = run.processes()
    assert len(at_work) == 2
    sessions = {os.getsid(process.pid) for process in at_work}
    assert os.getsid(child.pid) not in sessions  # so that a terminal's Ctrl-C reaches the driver alone
    os.kill(child.pid, number)
    child.join(PATIENCE)
    assert child.exitcode == 130
    assert f"interrupted; finished stages are kept. Continue with: ptl resume {run.path}" in said.read_text()
    assert run.processes() == [] and run.labels() == LABELS[:2]
    run.drive()
    run.check_complete()
    assert [run.starts(label) for label in LABELS] == [1, 1, 2, 1, 1, 0]
