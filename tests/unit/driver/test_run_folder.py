"""Nothing half-written gets a final name, nothing missing is replaced, and two drivers never share a run."""

import errno
import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config, read_saved_config
from ptl_rl.driver.loop import start_run
from ptl_rl.driver.run_folder import MissingArtefact, RunFolder
from ptl_rl.driver.state import ORIGINAL, Stage


def fill(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")


def test_commit_moves_a_complete_artefact(tmp_path):
    run, stage = RunFolder(tmp_path), Stage(1, "slice")
    fill(run.temporary(stage), "config.json", "plan.json", "model.safetensors")
    assert run.commit(stage) == "cycles/001/sliced"
    assert (tmp_path / "cycles/001/sliced/plan.json").exists() and not run.temporary(stage).exists()


def test_commit_refuses_an_incomplete_artefact(tmp_path):
    run, stage = RunFolder(tmp_path), Stage(1, "slice")
    fill(run.temporary(stage), "config.json")
    with pytest.raises(MissingArtefact, match=r"plan\.json"):
        run.commit(stage)
    fill(run.temporary(stage), "plan.json")
    with pytest.raises(MissingArtefact, match="weights"):
        run.commit(stage)
    assert not run.artefact(stage).exists()


def test_commit_replaces_what_a_killed_driver_renamed_but_did_not_journal(tmp_path):
    run, stage = RunFolder(tmp_path), Stage(2, "recover", 1)
    fill(run.artefact(stage), "config.json", "stale")
    fill(run.temporary(stage), "config.json", "model.safetensors")
    assert run.commit(stage) == "cycles/002/recovered-1"
    assert not (run.artefact(stage) / "stale").exists()


def test_what_one_cycles_stages_leave_is_told_apart(tmp_path):
    run = RunFolder(tmp_path)
    stages = [Stage(1, "recover", round_, part) for round_ in (0, 1) for part in (0, 1)]
    assert [run.artefact(stage).name for stage in stages] == [
        "recovered", "recovered-part2", "recovered-1", "recovered-1-part2",
    ]  # fmt: skip


def test_missing_checkpoint_is_never_substituted(tmp_path):
    run = RunFolder(tmp_path)
    fill(tmp_path / "original", "config.json")
    assert run.checkpoint(ORIGINAL, tmp_path / "original") == tmp_path / "original"
    with pytest.raises(MissingArtefact, match=r"cycles/001/recovered.*put it back"):
        run.checkpoint("cycles/001/recovered", tmp_path / "original")


def test_best_is_replaced(tmp_path):
    run = RunFolder(tmp_path)
    run.link_best("cycles/001/recovered")
    run.link_best("cycles/002/recovered")
    assert (tmp_path / "best").readlink() == Path("cycles/002/recovered")


def _hold(path: Path, ready, release) -> None:
    with RunFolder(path).locked():
        ready.set()
        release.wait(20)


def test_second_driver_is_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, release))
    process.start()
    assert ready.wait(30)
    with pytest.raises(ConfigError, match="another ptl process"), RunFolder(tmp_path).locked():
        pass
    release.set()
    process.join()
    with RunFolder(tmp_path).locked():
        pass


def refuse(number: int):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused_in_a_sentence(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    message = rf"{tmp_path}: the file system cannot lock files \(flock: {os.strerror(number)}\).*-o flock.*`run_dir`"
    with pytest.raises(ConfigError, match=message), RunFolder(tmp_path).locked():
        pass


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (Path, "symlink_to", r"the file system cannot replace a symbolic link \(Operation not permitted\)"),
        (os, "fsync", r"the file system cannot wait until data is on disk \(fsync\) \(Operation not permitted\)"),
        (os, "open", r"cannot write there \(Operation not permitted\)"),
    ],
)
def test_what_a_run_needs_of_a_file_system_is_tried_out_first(tmp_path, monkeypatch, module, name, message):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, refuse(errno.EPERM))
        with pytest.raises(ConfigError, match=message), RunFolder(tmp_path).locked():
            pass
    with RunFolder(tmp_path).locked():
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_synced_does_not_stop_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    with RunFolder(tmp_path).locked():
        pass


def test_only_a_run_that_began_is_protected(tmp_path, repository):
    config = load_config(repository / "recipes/demo_restart_cpu.yaml")
    start_run(config, tmp_path / "run")
    folder = start_run(config.model_copy(update={"seed": 7}), tmp_path / "run")  # refused by a cluster, say
    assert read_saved_config(folder.config).seed == 7
    (folder.logs / "000-evaluate.1.spec.json").touch()
    with pytest.raises(ConfigError, match="already holds a run; continue it with: ptl resume"):
        start_run(config, tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run: cannot write there \(Not a directory\); choose"):
        start_run(config, tmp_path / "file" / "run")
