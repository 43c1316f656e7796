"""A run that is resumed goes on with the model that it began with, or says that it cannot."""

import json
import shutil

import pytest
from driven_runs import labels_of

from ptl_rl.config import ConfigError
from ptl_rl.driver.loop import StageFailed
from ptl_rl.testbed import CHECKPOINT_DIR


@pytest.fixture
def begun(make_driven, tmp_path):
    """A run whose first cut failed, and its model and parent, copies of the shipped one."""
    model, parent = tmp_path / "model", tmp_path / "parent"
    shutil.copytree(CHECKPOINT_DIR, model)
    shutil.copytree(CHECKPOINT_DIR, parent)
    run = make_driven(model={"path": str(model), "parent": str(parent)})
    run.act({"001-slice": "raise"})
    with pytest.raises(StageFailed):
        run.drive()
    run.act({})
    return run, model, parent


@pytest.mark.parametrize("which", ["path", "parent"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "chat_template.jinja"])
def test_another_model_under_the_same_name_is_refused(begun, which, file):
    run, *folders = begun
    path = folders[which == "parent"] / file
    content = bytearray(path.read_bytes())
    if file == "model.safetensors":
        content[-2000:] = bytes(2000)  # other weights of the same shapes
    else:
        content += b" "
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"model\.{which}: {path.parent} is not the model .* \({file} changed since\)"
    ):
        run.drive()
    assert run.labels() == labels_of(1)[:2] and run.starts("001-slice") == 1  # nothing was started


def test_the_same_model_goes_on(begun):
    run, model, _ = begun
    (model / "README.md").write_text("a card may change")
    run.drive()
    run.check_complete()


def test_a_run_of_an_earlier_version_gets_its_record(begun):
    run, *_ = begun
    record = run.path / "models.json"
    written = record.read_text()
    assert set(json.loads(written)["files"]) == {"model.path", "model.parent"}
    record.unlink()
    run.drive()
    assert record.read_text() == written


def test_a_record_that_cannot_be_read_is_named(begun):
    run, *_ = begun
    (run.path / "models.json").write_text("{")
    with pytest.raises(ConfigError, match=r"models\.json: cannot be read; put it back"):
        run.drive()
