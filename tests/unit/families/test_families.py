"""Sizes computed from config.json equal those of the real model, for every family."""

import json

import pytest

from ptl_rl.families import FAMILIES, UnsupportedModelError, read_shape
from ptl_rl.testbed.tiny_models import tiny_model

SIZES = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_exact(family, tied, make_checkpoint):
    model = tiny_model(family, **SIZES, tie_word_embeddings=tied)
    folder = make_checkpoint(family, tie_word_embeddings=tied)
    assert read_shape(folder).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_llama_biases_are_counted(biases, make_checkpoint):
    folder = make_checkpoint("llama", **biases)
    model = tiny_model("llama", **SIZES, **biases)
    assert read_shape(folder).parameters == sum(p.numel() for p in model.parameters())


def test_flops_are_two_per_weight_of_every_matrix():
    model = tiny_model("qwen2", **SIZES)
    weights = [p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    from ptl_rl.families.base import shape_from_config

    shape = shape_from_config(model.config.to_dict(), FAMILIES, "here")
    assert shape.flops_per_token(output_head=False) == 2 * sum(weights)
    assert shape.flops_per_token() - shape.flops_per_token(output_head=False) == 2 * 304 * 32


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_flops_agree_with_what_torch_counts(family, make_checkpoint):
    """To 1 %, prompt attention included: torch counts every query against every key, the masked ones too."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    tokens = 24
    model = tiny_model(family, **SIZES)
    model.set_attn_implementation("eager")  # torch does not count the fused kernel of CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(5, 300, (2, tokens)), use_cache=False)
    expected = 2 * tokens * read_shape(make_checkpoint(family)).flops_per_token(context_tokens=tokens)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_unsupported_models_are_refused_with_the_list(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported; supported are gemma2, .*qwen3"):
        read_shape(tmp_path)
    for model_type, key in (("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, key: 8}))
        message = rf"'{model_type}' is a mixture of experts \({key} is 8\).* only dense models are supported: gemma2"
        with pytest.raises(UnsupportedModelError, match=message):
            read_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UnsupportedModelError, match="lacks 'num_attention_heads'"):
        read_shape(tmp_path)
    with pytest.raises(UnsupportedModelError, match="does not exist"):
        read_shape(tmp_path / "nowhere")
