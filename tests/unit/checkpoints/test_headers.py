"""A checkpoint whose files are not what its configuration says is refused by its headers, in a sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptl_rl.checkpoints.headers import check_weights
from ptl_rl.checkpoints.read import check_finite
from ptl_rl.families import FAMILIES, UnsupportedModelError, read_shape

Tensors = dict[str, torch.Tensor]
LAYER, GATE = "model.layers.1.", "model.layers.1.mlp.gate_proj.weight"
SHARDS = "model.safetensors.index.json"


def check(folder: Path) -> None:
    check_weights(folder, read_shape(folder))


def with_tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def with_config(**values) -> Callable[[Path], None]:
    """``...`` removes a key."""

    def rewrite(folder: Path) -> None:
        path = folder / "config.json"
        found = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))

    return rewrite


def with_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        index = json.loads((folder / SHARDS).read_text())
        change(index["weight_map"])
        (folder / SHARDS).write_text(json.dumps(index))

    return rewrite


def renamed(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"language_model.{name}"] = tensors.pop(name)


def quantised(tensors: Tensors) -> None:
    tensors[GATE] = tensors[GATE].to(torch.float8_e4m3fn)
    tensors[f"{GATE}_scale_inv"] = torch.ones(1)


def own_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.fixture
def copy(make_checkpoint, tmp_path):
    """A folder of a family that may be changed."""
    made: dict[str, Path] = {}

    def fresh(family: str, **overrides) -> Path:
        return Path(shutil.copytree(make_checkpoint(family, **overrides), tmp_path / f"{family}-{len(made)}"))

    return fresh


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_as_they_are_saved_are_taken(family, copy):
    for options in ({}, {"tie_word_embeddings": False}, {"max_shard_size": "20KB"}):
        check(folder := copy(family, **options))
        check_finite(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_tensors(quantised), rf"is quantised, .* before quantisation \({GATE} is F8_E4M3\)"),
        (with_config(quantization_config={"quant_method": "fp8"}), r"is quantised.*quantization_config: fp8"),
        (with_config(tie_word_embeddings=False), "lm_head.weight is missing, though tie_word_embeddings false gives"),
        (
            with_config(tie_word_embeddings=...),
            r"head.weight is missing, though .* \(not set; by default of llama\)",
        ),
        (with_tensors(own_head), "lm_head.weight is not model.embed_tokens.weight, though tie_word_embeddings true"),
        (with_tensors(lambda t: t.pop(GATE)), f"they lack {GATE}; take the configuration"),
        (with_tensors(renamed), r"they lack model.embed_tokens.* more and have language_model.model.embed_tokens"),
        (with_tensors(lambda t: t.update(extra=torch.ones(2))), "a llama of 3 blocks: they have extra beside them"),
        (with_config(num_hidden_layers=2), r"have model.layers.2.input_layernorm.* more beside them"),
        (with_config(num_hidden_layers=4), r"lack model.layers.3.input_layernorm"),
        (with_config(intermediate_size=40), r"gate_proj.weight is of shape \[48, 32\], but .* makes it \[40, 32\]"),
        (with_config(vocab_size=320), r"embed_tokens.weight is of shape \[304, 32\], but"),
        (with_config(num_key_value_heads=4), r"k_proj.weight is of shape \[16, 32\], but .* makes it \[32, 32\]"),
        (with_config(model_type="qwen2"), r"a qwen2 of 3 blocks: they lack model.layers.0.self_attn.k_proj.bias"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "an adapter of another model; merge it"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors: is empty; download"),
        (
            lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "model.safetensors: is a Git LFS pointer",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_text("<html>Please log in to go on.</html>"),
            "model.safetensors: is a web page",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1]),
            r"model.safetensors: cannot be read \(.*\); download or write it again",
        ),
        (
            lambda folder: shutil.copy(folder / "model.safetensors", folder / "old.safetensors"),
            "has old.safetensors beside model.safetensors, and vLLM reads every",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors"),
            "needs model.safetensors.index.json beside it",
        ),
        (lambda folder: (folder / "model.safetensors").rename(folder / "weights.bin"), "no model.safetensors; only"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration(change, message, copy):
    folder = copy("llama", tie_word_embeddings=True)
    change(folder)
    with pytest.raises(UnsupportedModelError, match=message):
        check(folder)


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: first_shard(folder).unlink(), "the index names files that do not exist: .*-00001-of"),
        (
            with_index(lambda names: names.update({GATE: "../other.safetensors"})),
            "names ../other.safetensors, which",
        ),
        (with_index(lambda names: names.update({GATE: "/etc/passwd"})), "names /etc/passwd, which is not a file of"),
        (with_index(lambda names: names.update({GATE: 3})), "names 3, which is not a file of this folder"),
        (with_index(lambda names: names.pop(GATE)), f"holds {GATE}, which the index lacks"),
        (with_index(lambda names: names.update(extra=names[GATE])), "lacks extra, which the index says it holds"),
        (lambda folder: (folder / SHARDS).write_text("[]"), f"{SHARDS}: is no index of weights"),
        (lambda folder: (folder / SHARDS).write_text(""), f"{SHARDS}: is empty"),
        (lambda folder: (folder / SHARDS).unlink(), f"needs {SHARDS} beside it"),
        (lambda folder: first_shard(folder).write_text("<html></html> "), "-00001-of-.*: is a web page"),
        (
            lambda folder: shutil.copy(first_shard(folder), folder / "model.safetensors"),
            "has model.safetensors beside an index of other files",
        ),
    ],
)
def test_shards_that_do_not_go_together(change, message, copy):
    folder = copy("llama", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    change(folder)
    with pytest.raises(UnsupportedModelError, match=message):
        check(folder)


def test_qwen2_weights_under_a_llama_configuration(copy):
    folder = copy("qwen2")
    with_config(model_type="llama")(folder)
    with pytest.raises(UnsupportedModelError, match=r"a llama .* have model.layers.0.self_attn.k_proj.bias, .* 7 more"):
        check(folder)


def test_what_published_models_have_beside_their_weights_is_taken(copy):
    """A copy of the embedding as head (Qwen3-0.6B), old buffers, Mistral's own file, Gemma without the key."""
    folder = copy("llama", tie_word_embeddings=True)
    with_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    with_tensors(lambda t: t.update({f"{LAYER}self_attn.rotary_emb.inv_freq": torch.ones(4)}))(folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    check(folder)
    folder = copy("gemma2", tie_word_embeddings=True)
    with_config(tie_word_embeddings=...)(folder)
    check(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers(value, dtype, copy):
    folder = copy("llama")

    def damage(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors[GATE][-1, -1] = value

    with_tensors(damage)(folder)
    with pytest.raises(UnsupportedModelError, match=f"{GATE} holds values that are infinite or not a number"):
        check_finite(folder)
