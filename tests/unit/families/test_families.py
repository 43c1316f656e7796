"""Sizes computed from config.json equal those of the real model, for every family."""

import json

import pytest
from transformers import AutoConfig

from ptl_rl.families import BASELINES, FAMILIES, UnsupportedModelError, is_capped, read_shape, shape_from_config
from ptl_rl.testbed.tiny_models import tiny_config, tiny_model

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


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}]
)
def test_every_tensor_has_the_name_and_the_shape_of_the_real_model(family, changes):
    model = tiny_model(family, **SIZES, **changes)
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if changes["tie_word_embeddings"]:
        del real["lm_head.weight"]
    assert shape_from_config(model.config.to_dict(), FAMILIES, "here").tensors() == real


def test_every_tensor_of_a_baseline():
    from ptl_rl.baselines.slicegpt.modeling import SliceGptLlamaConfig, SliceGptLlamaForCausalLM

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    sizes |= {"vocab_size": 304, "num_hidden_layers": 2, "attention_bias": True}
    model = SliceGptLlamaForCausalLM(SliceGptLlamaConfig(hidden_size=24, **sizes))
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shape_from_config(model.config.to_dict(), BASELINES, "here").tensors() == real


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_configuration_does_not_say_is_what_transformers_takes(family):
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 64  # as no family has key-value heads by default
    real = AutoConfig.for_model(family, **sizes)
    shape = shape_from_config({"model_type": family, **sizes}, FAMILIES, "here")
    head_dim = getattr(real, "head_dim", None) or 512 // 64
    assert (shape.num_key_value_heads, shape.head_dim) == (real.num_key_value_heads, head_dim)
    assert shape.tied == real.tie_word_embeddings
    assert is_capped({"model_type": family}) == (getattr(real, "attn_logit_softcapping", None) is not None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "has '0' as 'num_attention_heads', a whole number above 0"),
        ({"hidden_size": None}, "has 'None' as 'hidden_size'"),
        ({"hidden_size": 2}, "has '0' as 'head_dim'"),
        ({"vocab_size": "many"}, "has 'many' as 'vocab_size'"),
        ({"num_hidden_layers": -1}, "has '-1' as 'num_hidden_layers'"),
        ({"intermediate_size": 48.5}, "has '48.5' as 'intermediate_size'"),
        ({"num_key_value_heads": 3}, "4 attention heads for 3 key-value heads"),
        ({"max_position_embeddings": [2048]}, r"has '\[2048\]' as 'max_position_embeddings'"),
        ({"num_experts": "8"}, "is a mixture of experts"),
    ],
)
def test_sizes_that_cannot_be_sizes_are_refused(changes, message):
    values = tiny_config("llama", **SIZES).to_dict() | {"head_dim": None} | changes
    with pytest.raises(UnsupportedModelError, match=message):
        shape_from_config(values, FAMILIES, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", r"holds \[\], not a model's settings"),
        (b"null", "holds None, not a model's settings"),
        (b'{"model_type": "ll\xe4ma"}', "cannot be read: 'utf-8' codec"),
        (b"", "is empty; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer.* git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page, not the file itself"),
        (b"[" * 100_000, "cannot be read: "),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "cannot be read: "),
    ],
)
def test_a_configuration_that_is_none_is_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=message):
        read_shape(tmp_path)


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_llama_biases_are_counted(biases, make_checkpoint):
    folder = make_checkpoint("llama", **biases)
    model = tiny_model("llama", **SIZES, **biases)
    assert read_shape(folder).parameters == sum(p.numel() for p in model.parameters())


def test_flops_are_two_per_weight_of_every_matrix():
    model = tiny_model("qwen2", **SIZES)
    weights = [p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
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
