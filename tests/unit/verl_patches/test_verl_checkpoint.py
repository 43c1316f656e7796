"""Recovered policies are written by all ranks, and verl still gathers them on one."""

import inspect
import json
import pickle
import shutil

import pytest
import torch
from forked import call_forked
from process_ranks import run_ranks
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from ptl_rl.testbed.tiny_models import tiny_model

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": 1, "pad_token_id": 0}


@pytest.mark.canary
def test_verl_still_gathers_on_one_rank():
    """If this fails, `ptl_rl.verl_patches.checkpoint` can go."""
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    assert "rank0_only=True" in inspect.getsource(FSDPCheckpointManager.save_checkpoint)


def test_verls_engine_is_given_our_writer(monkeypatch):
    from verl.workers.engine.fsdp import transformer_impl

    from ptl_rl.verl_patches.checkpoint import ShardedCheckpointManager
    from ptl_rl.verl_patches.engine import write_checkpoints_on_all_ranks

    monkeypatch.setattr(transformer_impl, "FSDPCheckpointManager", None)
    write_checkpoints_on_all_ranks()
    assert transformer_impl.FSDPCheckpointManager is ShardedCheckpointManager


def unpickled(pickled):
    from verl.workers.engine.fsdp import transformer_impl as engine

    before = engine.FSDPCheckpointManager.__name__
    return before, pickle.loads(pickled).last_step, engine.FSDPCheckpointManager.__name__


def test_a_worker_that_is_handed_the_settings_has_our_writer():
    """verl's SFT trainer does not import `external_lib` in its workers; theirs is the unpickling only."""
    from ptl_rl.verl_patches.engine import StepwiseCheckpointConfig

    found = call_forked(unpickled, pickle.dumps(StepwiseCheckpointConfig(last_step=24)))
    assert found == ("FSDPCheckpointManager", 24, "ShardedCheckpointManager")


def save(rank, ranks, folder, family, tied):
    from ptl_rl.verl_patches import checkpoint

    model = tiny_model(family, num_hidden_layers=3, tie_word_embeddings=tied, **SIZES)
    if family == "qwen2":
        model.config.name_or_path = str(folder / "gone")
    if rank == 0:
        model.save_pretrained(folder / "expected")
        (folder / "step/huggingface").mkdir(parents=True, exist_ok=True)
        (folder / "step/huggingface/merges.txt").write_text("as verl wrote it")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    model(torch.arange(12)[None])  # leaves the root's weights unsharded, as a last validation does
    written = []
    write = checkpoint.write_tensors

    def counted(tensors, path):
        written.append(sum(tensor.nbytes for tensor in tensors.values()))
        write(tensors, path)

    checkpoint.write_tensors = counted
    contents = {"save_contents": ["hf_model"], "load_contents": []}
    manager = checkpoint.ShardedCheckpointManager(model, None, checkpoint_config=contents)
    manager.save_checkpoint(str(folder / "step"), global_step=1)
    parameters = list(model.parameters())
    whole, largest = sum(p.numel() * 4 for p in parameters), max(p.numel() * 4 for p in parameters)
    assert len(written) == 1 and 0 < written[0] <= whole / ranks + largest
    # The same again, over what is there.
    manager.save_checkpoint(str(folder / "step"), global_step=2)


@pytest.mark.parametrize(
    ("ranks", "family", "tied"), [(2, "qwen2", True), (2, "gemma3_text", True), (4, "llama", False)]
)
def test_ranks_write_their_share_of_one_checkpoint(tmp_path, ranks, family, tied):
    run_ranks(save, ranks, tmp_path, family, tied)
    folder = tmp_path / "step/huggingface"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == ranks
    assert ("lm_head.weight" in index["weight_map"]) is not tied
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert (folder / "merges.txt").read_text() == "as verl wrote it"  # there is no source to copy from
    found, wanted = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "expected"))
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in found.state_dict().items())


def save_loaded(rank, ranks, folder):
    from transformers import AutoTokenizer

    from ptl_rl.verl_patches.checkpoint import ShardedCheckpointManager

    source = folder / "source"
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32", attn_implementation="eager")
    fully_shard(model)
    contents = {"save_contents": ["hf_model"], "load_contents": []}
    tokenizer = AutoTokenizer.from_pretrained(source)
    manager = ShardedCheckpointManager(model, None, processing_class=tokenizer, checkpoint_config=contents)
    manager.save_checkpoint(str(folder / "step"), global_step=1)


def test_what_stands_beside_the_weights_is_the_sources(tmp_path, make_checkpoint):
    """As hub checkpoints have it: rope in the form of version 4, sampling that version 5 does not write back."""
    source = tmp_path / "source"
    shutil.copytree(make_checkpoint("qwen2"), source)
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": 123456.0, "torch_dtype": "bfloat16", "attn_implementation": "sdpa"}
    assert config.pop("dtype") == "float32" and rope["rope_theta"] != config["rope_theta"]
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": [1, 2]}')
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2TokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    run_ranks(save_loaded, 1, tmp_path)
    written = tmp_path / "step/huggingface"
    del config["attn_implementation"]
    assert json.loads((written / "config.json").read_text()) == config | {"torch_dtype": "float32"}
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (written / name).read_bytes() == (source / name).read_bytes()
    found, wanted = (AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (written, source))
    ids = torch.arange(12)[None]
    assert torch.equal(found(ids).logits, wanted(ids).logits)


def train(rank, ranks, folder):
    from ptl_rl.verl_patches import checkpoint
    from ptl_rl.verl_patches.engine import StepwiseCheckpointConfig

    def manager_of(model):
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.arange(12)[None]).logits.sum().backward()
        optimizer.step()
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        contents = StepwiseCheckpointConfig(
            save_contents=["hf_model", "model", "optimizer", "extra"],
            load_contents=["model", "optimizer", "extra"],
            last_step=24,
        )
        return checkpoint.ShardedCheckpointManager(model, optimizer, schedule, checkpoint_config=contents)

    def kinds(step):
        names = [path.name for path in (folder / str(step)).rglob("*")]
        return {name.split("_")[0] for name in names if name.endswith(".pt")} | {
            "weights" for name in names if name.endswith(".safetensors")
        }

    def full(tensors, path):
        raise OSError("No space left on device")

    model = tiny_model("qwen2", num_hidden_layers=2, **SIZES)
    fully_shard(model)
    manager = manager_of(model)
    for step in (8, 16):
        manager.save_checkpoint(str(folder / str(step)), global_step=step, max_ckpt_to_keep=2)
        assert kinds(step) == {"model", "optim", "extra"}
    write, checkpoint.write_tensors = checkpoint.write_tensors, full
    with pytest.raises(OSError, match="No space left"):
        manager.save_checkpoint(str(folder / "24"), None, 24, 2)
    checkpoint.write_tensors = write
    # What is left is what training goes on from, in another process, say.
    other = tiny_model("qwen2", seed=1, num_hidden_layers=2, **SIZES)
    fully_shard(other)
    again = manager_of(other)
    assert not (folder / "8").exists()
    again.load_checkpoint(str(folder / "16"))
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(found.full_tensor(), expected.full_tensor())
    again.save_checkpoint(str(folder / "20"), global_step=20, max_ckpt_to_keep=2)
    again.save_checkpoint(str(folder / "24"), global_step=24, max_ckpt_to_keep=2)
    assert kinds(24) == {"weights"}
    assert kinds(20) == {"model", "optim", "extra"} and not (folder / "16").exists()
    assert again.checkpoint_save_contents[0] == "hf_model"  # of the next one


def test_states_are_written_before_the_last_step_and_weights_at_it(tmp_path):
    run_ranks(train, 1, tmp_path)


def fill_the_disk(rank, ranks, folder):
    from ptl_rl.verl_patches import checkpoint

    model = tiny_model("qwen2", num_hidden_layers=2, **SIZES)
    fully_shard(model)
    contents = {"save_contents": ["hf_model", "model"], "load_contents": []}
    manager = checkpoint.ShardedCheckpointManager(model, None, checkpoint_config=contents)
    manager.save_checkpoint(str(folder / "1"), global_step=1, max_ckpt_to_keep=1)

    def full(tensors, path):
        raise OSError("No space left on device")

    write, checkpoint.write_tensors = checkpoint.write_tensors, full
    with pytest.raises(OSError, match="No space left"):
        manager.save_checkpoint(str(folder / "2"), global_step=2, max_ckpt_to_keep=1)
    assert (folder / "1/huggingface/model.safetensors").exists()
    checkpoint.write_tensors = write
    manager.save_checkpoint(str(folder / "2"), global_step=2, max_ckpt_to_keep=1)
    assert not (folder / "1").exists() and (folder / "2/huggingface/model.safetensors").exists()


def test_the_checkpoint_before_stays_until_the_weights_are_written(tmp_path):
    run_ranks(fill_the_disk, 1, tmp_path)


def test_files_of_another_number_of_ranks_do_not_stay(tmp_path):
    for ranks in (2, 1):
        run_ranks(save, ranks, tmp_path, "qwen2", True)
    assert [path.name for path in (tmp_path / "step/huggingface").glob("*.safetensors*")] == ["model.safetensors"]
