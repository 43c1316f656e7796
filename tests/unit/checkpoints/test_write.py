"""Which tensors stand in which file, and what a file is like."""

import pytest
import torch
from safetensors.torch import load_file

from ptl_rl.checkpoints import write
from ptl_rl.checkpoints.write import group_into_files, write_tensors


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_files_are_of_about_equal_size_one_per_rank(ranks):
    sizes = {f"tensor{i}": 10 + i % 3 for i in range(40)}
    groups = group_into_files(sizes, ranks)
    assert [name for group in groups for name in group] == list(sizes)
    assert len(groups) == ranks
    filled = [sum(sizes[name] for name in group) for group in groups]
    assert max(filled) - min(filled) <= ranks * max(sizes.values())


def test_no_file_is_above_the_limit_unless_one_tensor_is(monkeypatch):
    monkeypatch.setattr(write, "MAX_FILE_BYTES", 25)
    assert group_into_files({"a": 10, "b": 10, "c": 10, "d": 90, "e": 5}, 1) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_more_ranks_than_tensors_leave_some_without_a_file():
    assert group_into_files({"a": 10, "b": 10}, 4) == [["a"], ["b"]]


def test_weights_are_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    path = tmp_path / "model.safetensors"
    write_tensors({"weight": torch.arange(3.0)}, path)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert torch.equal(load_file(path)["weight"], torch.arange(3.0))


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_tensors({"weight": torch.arange(3.0)}, path)

    def full(tensors, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_tensors({"weight": torch.arange(4.0)}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(path)["weight"], torch.arange(3.0))
