"""A run that is resumed goes on with the model that it began with, or says that it cannot."""

import json
import shutil

import pytest
from driven_runs import Told, labels_of

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
        content[len(content) // 2] ^= 1  # other weights of the same shapes
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
    for other in ("README.md", "eval_results.json", "notes.txt", "pretraining.json"):
        (model / other).write_text("what loading does not read may change")
    run.drive()
    run.check_complete()


def test_a_run_of_an_earlier_version_gets_its_record_and_says_so(begun):
    run, *_ = begun
    record, told = run.path / "models.json", Told()
    written = record.read_text()
    assert set(json.loads(written)["models"]) == {"model.path", "model.parent"}
    record.unlink()
    run.drive(told)
    assert record.read_text() == written
    assert [note for note in told.notes if "no record of its models" in note]


def test_before_a_stage_has_finished_the_model_may_be_mended(make_driven, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT_DIR, model)
    run = make_driven(model={"path": str(model)})
    run.act({"000-evaluate": "raise"})
    with pytest.raises(StageFailed):
        run.drive()
    run.act({})
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    told = Told()
    run.drive(told)
    run.check_complete()
    assert not [note for note in told.notes if "no record" in note]


def test_a_record_that_cannot_be_read_is_named(begun):
    run, *_ = begun
    (run.path / "models.json").write_text("")
    with pytest.raises(ConfigError, match=r"models\.json: cannot be read; delete it if"):
        run.drive()
