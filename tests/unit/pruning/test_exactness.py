"""The export contract, per family: the sliced checkpoint computes exactly what the masked original computes."""

import json
import random
import shutil

import pytest
import torch
from plans import plan_keeping
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl_rl.families import FAMILIES
from ptl_rl.pruning.masking import masked
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.slice.slicing import slice_checkpoint

WIDTH, BLOCKS = 48, 3


def random_plan(seed: int, keep: int, layers: int) -> PruningPlan:
    rng = random.Random(seed)
    channels = [sorted(rng.sample(range(WIDTH), keep)) for _ in range(BLOCKS)]
    kept = sorted(rng.sample(range(BLOCKS), layers))
    return plan_keeping(channels, WIDTH, [layer for layer in range(BLOCKS) if layer not in kept])


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(("keep", "layers"), [(20, 3), (48, 2), (7, 1)])
class TestExport:
    def test_logits_equal_the_masked_models(self, family, keep, layers, make_checkpoint, tmp_path):
        source, plan = make_checkpoint(family, tie_word_embeddings=keep != 20), random_plan(keep, keep, layers)
        slice_checkpoint(source, plan, tmp_path)
        ids_BT = torch.randint(0, 300, (2, 90))
        original = AutoModelForCausalLM.from_pretrained(source).eval()
        with torch.no_grad():
            unmasked_BTV = original(input_ids=ids_BT).logits
            with masked(original, FAMILIES[family], plan):
                expected_BTV = original(input_ids=ids_BT).logits
            sliced = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
            actual_BTV = sliced(input_ids=ids_BT).logits
            again_BTV = original(input_ids=ids_BT).logits
        assert (unmasked_BTV - expected_BTV).abs().max() > 1e-3  # the plan does change something
        torch.testing.assert_close(actual_BTV, expected_BTV, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again_BTV, unmasked_BTV, atol=0, rtol=0)  # the hooks are gone
        assert sliced.config.intermediate_size == keep and sliced.config.num_hidden_layers == layers
        assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(AutoTokenizer.from_pretrained(source))


def test_a_sliced_checkpoint_names_no_attention(make_checkpoint, tmp_path):
    """transformers obeys it on loading, and fails where flash-attn is missing."""
    source = make_checkpoint("llama")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "attn_implementation": "flash_attention_2"}))
    slice_checkpoint(source, random_plan(1, 20, 3), tmp_path)
    assert (
        not {"attn_implementation", "_attn_implementation"} & json.loads((tmp_path / "config.json").read_text()).keys()
    )
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("kept", "named"), [(3, set()), (2, {"layer_types", "max_window_layers"})])
def test_a_configuration_stays_as_it_was_written(make_checkpoint, tmp_path, kept, named):
    """In the form of version 4 of transformers, which read what version 5 writes with another base of its rope."""
    source = tmp_path / "source"
    shutil.copytree(make_checkpoint("qwen2"), source)
    values = json.loads((source / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "max_window_layers"):
        values.pop(name, None)
    values |= {"rope_theta": 123456.0, "torch_dtype": "float32", "use_sliding_window": False}
    (source / "config.json").write_text(json.dumps(values))
    (tmp_path / "out").mkdir()
    slice_checkpoint(source, random_plan(4, 20, kept), tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    changed = {"intermediate_size": 20} | ({"num_hidden_layers": kept} if kept < 3 else {})
    assert {name: value for name, value in written.items() if name not in named} == values | changed
    assert named <= written.keys()


WINDOWED = {
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
}


@pytest.mark.parametrize("family", sorted(WINDOWED))
@pytest.mark.parametrize("removed", range(BLOCKS))
def test_kept_blocks_keep_their_attention_kind(family, removed, make_checkpoint, tmp_path):
    source = make_checkpoint(family, **WINDOWED[family])
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    kinds = original.config.layer_types
    assert len(set(kinds)) == 2
    kept = [layer for layer in range(BLOCKS) if layer != removed]
    plan = random_plan(0, 48, 3).model_copy(update={"keep_layers": kept, "layer_order": [removed]})
    slice_checkpoint(source, plan, tmp_path)
    sliced = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert sliced.config.layer_types == [kinds[layer] for layer in kept]
    if family.startswith("qwen"):  # what engines read instead of layer_types
        assert sliced.config.max_window_layers == sliced.config.layer_types.count("full_attention")
    ids_BT = torch.randint(0, 300, (2, 60))
    with torch.no_grad(), masked(original, FAMILIES[family], plan):
        torch.testing.assert_close(
            sliced(input_ids=ids_BT).logits, original(input_ids=ids_BT).logits, atol=1e-5, rtol=1e-5
        )


def test_biases_survive(make_checkpoint, tmp_path):
    source, plan = make_checkpoint("llama", attention_bias=True, mlp_bias=True), random_plan(1, 20, 2)
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    biases = {name: p for name, p in original.named_parameters() if name.endswith(".bias")}
    assert {name.split(".")[-2] for name in biases} >= {"q_proj", "o_proj", "gate_proj", "down_proj"}
    with torch.no_grad():
        for bias in biases.values():  # they begin as zeros
            bias.normal_(std=0.2)
    original.save_pretrained(source)
    slice_checkpoint(source, plan, tmp_path / "out")
    sliced = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids_BT = torch.randint(0, 300, (2, 30))
    with torch.no_grad(), masked(original, FAMILIES["llama"], plan):
        torch.testing.assert_close(
            sliced(input_ids=ids_BT).logits, original(input_ids=ids_BT).logits, atol=1e-5, rtol=1e-5
        )


def test_checkpoint_in_several_files(make_checkpoint, tmp_path):
    source, plan = make_checkpoint("llama", max_shard_size="20KB"), random_plan(3, 20, 2)
    assert len(list(source.glob("*.safetensors"))) > 2
    slice_checkpoint(source, plan, tmp_path)
    original, sliced = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (source, tmp_path))
    ids_BT = torch.randint(0, 300, (1, 12))
    with torch.no_grad(), masked(original, FAMILIES["llama"], plan):
        torch.testing.assert_close(sliced(input_ids=ids_BT).logits, original(input_ids=ids_BT).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_channels": [[0, 1], [0], [1, 2]]}, "same number of channels"),
        ({"keep_channels": [[0, 0], [0, 1], [1, 2]]}, "block 0: channels must ascend"),
        ({"keep_channels": [[0, 1], [1, 0], [1, 48]]}, "block 1: channels must ascend"),
        ({"keep_layers": []}, "at least one"),
        ({"keep_layers": [0, 3]}, "ascend within 0..2"),
        ({"layer_order": [0, 1]}, "must name the blocks that keep_layers"),
        ({"alignment": 32}, "keeps 20 channels per block, which is not a multiple of 32"),
    ],
)
def test_impossible_plans_are_refused(change, message):
    values = {**random_plan(0, 20, 2).model_dump(), **change}
    with pytest.raises(ValueError, match=message):
        PruningPlan.model_validate(values)
