"""Rotation alone changes nothing; slicing leaves an ordinary folder that transformers loads."""

import json
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from ptl_rl.baselines import slicegpt
from ptl_rl.baselines.slicegpt.command import slice_with_slicegpt, sliced_size
from ptl_rl.baselines.slicegpt.rotate import SliceGptError, check, principal_basis, slice_stream
from ptl_rl.config import ConfigError, ScoreConfig
from ptl_rl.data.encoding import Sequence
from ptl_rl.errors import OutputError
from ptl_rl.families import UnsupportedModelError, read_prunable_shape, read_shape
from ptl_rl.pruning.score.calibration import batches_for_rank
from ptl_rl.testbed.tiny_models import tiny_config, tiny_model

SIZES = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "pad_token_id": 0}
FORMS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("qwen2", {}),
    ("mistral", {"sliding_window": None}),
]
CONFIG = ScoreConfig.model_validate(
    {
        "data": {"path": "testbed:rl", "rows": 24},
        "calibration": {"sequences": 24, "batch_size": 8, "max_tokens": 64, "prompt_weight": 1.0},
    }
)


def model_of(family, overrides):
    """With norms and biases that are not those of a new model."""
    model = tiny_model(family, **{**SIZES, **overrides}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def batches(count=12):
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(8, 40, (count,), generator=generator).tolist()
    sequences = [Sequence(torch.randint(5, 300, (length,), generator=generator).tolist(), 0) for length in lengths]
    return list(batches_for_rank(sequences, 4, 0, 1, 0, 1.0))


@pytest.mark.parametrize(("family", "overrides"), FORMS)
def test_rotation_alone_reproduces_the_logits(family, overrides):
    model = model_of(family, overrides)
    rotated = slice_stream(model, batches(), SIZES["hidden_size"])
    ids = torch.randint(5, 300, (3, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = model(ids).logits, rotated(ids).logits
    assert (expected - found).abs().max() < 1e-4
    # And it is a rotation, not a copy.
    assert not torch.allclose(rotated.model.embed_tokens.weight, model.model.embed_tokens.weight, atol=0.1)


def test_slicing_keeps_what_the_calibration_tokens_use():
    """A stream that lies in a subspace of 20 units loses nothing when it is cut to 20."""
    model = model_of("llama", {})
    plane = torch.linalg.qr(torch.randn(32, 20, generator=torch.Generator().manual_seed(4)))[0]
    onto = plane @ plane.T
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ onto)
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.copy_(onto @ writer.weight)
    sliced = slice_stream(model, batches(), 20)
    ids = torch.randint(5, 300, (3, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert (model(ids).logits - sliced(ids).logits).abs().max() < 1e-3


def test_a_model_in_bfloat16_is_rotated_in_float32():
    """Rounded once: no further from the original than its weights' own rounding explains."""
    exact = model_of("llama", {"num_hidden_layers": 6})
    rounded = model_of("llama", {"num_hidden_layers": 6}).bfloat16()
    rotated = slice_stream(rounded, batches(), SIZES["hidden_size"])
    assert rotated.dtype == torch.bfloat16
    ids = torch.randint(5, 300, (3, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = exact(ids).logits
        own = (rounded.float()(ids).logits - whole).abs().mean()
        found = (rotated.float()(ids).logits - whole).abs().mean()
    assert found < 2.5 * own


def test_rows_that_fill_a_batch_up_do_not_count():
    seen = []

    def basis(streams, masks, size):
        seen.append(sum(int(mask.sum()) for mask in masks))
        return principal_basis(streams, masks, size)

    slice_stream(model_of("llama", {}), batches(11), 24, basis=basis)
    assert set(seen) == {sum(int(b.mask_BT[b.is_sequence_B].sum()) for b in batches(11))}


def test_principal_components_are_those_of_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(2, 50, 8, generator=generator) * torch.linspace(4, 0.5, 8)
    mask = torch.ones(2, 50)
    mask[:, 40:] = 0
    stream[:, 40:] = 100 * torch.randn(2, 10, 8, generator=generator)
    basis = principal_basis([stream], [mask], 3)
    counted = stream[:, :40].reshape(-1, 8).double()
    _, _, expected = torch.linalg.svd(counted, full_matrices=False)
    overlap = (expected[:3] @ basis.double()).abs()
    assert torch.allclose(overlap, torch.eye(3, dtype=torch.float64), atol=1e-5)


def test_a_sliced_folder_loads_counts_right_and_is_not_pruned_further(make_checkpoint, tmp_path):
    slicegpt.register()
    made = slice_with_slicegpt(str(make_checkpoint("qwen2")), tmp_path / "out", CONFIG, remove="25%")
    assert (made.hidden_size, made.source_hidden_size) == (24, 32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    shape = read_shape(tmp_path / "out")
    assert shape.parameters == made.parameters == sum(p.numel() for p in model.parameters())
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(5, 300, (1, 16)), use_cache=False)
    assert counter.get_total_flops() == pytest.approx(16 * shape.flops_per_token(context_tokens=16), rel=0.01)
    with pytest.raises(UnsupportedModelError, match="is a baseline's"):
        read_prunable_shape(tmp_path / "out")
    generated = model.generate(torch.randint(5, 300, (2, 6)), max_new_tokens=4, do_sample=False)
    whole = model(generated).logits[:, 5:-1].argmax(-1)
    assert torch.equal(generated[:, 6:], whole)  # the cache holds what a whole pass computes


def test_what_stands_beside_the_weights_is_the_sources(make_checkpoint, tmp_path):
    """A generation configuration that transformers does not write back, too."""
    source, out = shutil.copytree(make_checkpoint("llama"), tmp_path / "source"), tmp_path / "out"
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": [1, 2]}')
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2TokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    slice_with_slicegpt(str(source), out, CONFIG, remove="8")
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_gradients_reach_every_weight_and_checkpointing_changes_none(make_checkpoint, tmp_path):
    slicegpt.register()
    slice_with_slicegpt(str(make_checkpoint("llama")), tmp_path / "out", CONFIG, remove="8")
    ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found[0].values())
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_models_without_such_a_form_are_refused():
    for family, says in (("gemma2", "cannot be rotated"), ("qwen3", "not for qwen3"), ("mistral", "sliding windows")):
        with pytest.raises(SliceGptError, match=says):
            check(tiny_config(family))


def test_sizes():
    assert sliced_size("25%", 576, 8) == 432
    assert sliced_size("100", 576, 8) == 480  # 476, to a multiple of 8
    assert sliced_size("0", 30, 8) == 30
    for amount, says in (("x", "give a number"), ("600", "would stay"), ("100%", "would stay")):
        with pytest.raises(ConfigError, match=says):
            sliced_size(amount, 576, 8)


def test_a_folder_with_something_in_it_is_not_overwritten(make_checkpoint, tmp_path):
    (tmp_path / "there").write_text("")
    with pytest.raises(OutputError, match="not an empty folder"):
        slice_with_slicegpt(str(make_checkpoint("llama")), tmp_path, CONFIG, remove="8")
