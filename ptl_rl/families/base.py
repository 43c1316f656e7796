"""What the pruning engine must know of a model family, and the arithmetic of a model's size, without torch.

A family is data: names of modules and a few facts about biases and norms. ``ptl plan`` needs only the ``config.json``.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptl_rl.errors import UserError


class UnsupportedModelError(UserError, ValueError):
    """A model this project cannot prune; the message says why and lists what it can."""


@dataclass(frozen=True)
class Family:
    """Names and facts of one Hugging Face architecture with a gated feed-forward network.

    ``layers`` and the projections are module paths; ``per_layer_fields`` are config lists with one entry per block,
    which must follow the blocks that are kept.
    """

    model_type: str
    norms_per_layer: int = 2
    qk_norm: bool = False
    qkv_bias: bool = False
    """Biases on q, k and v whatever the config says (Qwen2); otherwise ``attention_bias`` decides, for o too."""
    embeddings: str = "model.embed_tokens"
    layers: str = "model.layers"
    attention: str = "self_attn"
    o_proj: str = "o_proj"
    mlp: str = "mlp"
    gate_proj: str = "gate_proj"
    up_proj: str = "up_proj"
    down_proj: str = "down_proj"
    attention_norm: str | None = None
    """Norm of what the attention gives, before it joins the residual stream (Gemma 2 and 3)."""
    output_norm: str | None = None
    """Norm of what the feed-forward network gives, before it joins the residual stream (Gemma 2 and 3)."""
    norm_offset: float = 0.0
    """What a norm adds to its weight before it multiplies."""
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    stream_matrices: int = 0
    """Square matrices of a block that its residual stream goes through (SliceGPT)."""
    prunable: bool = True
    tied_by_default: bool = False
    """Input and output embeddings are one where the configuration does not say (Gemma)."""

    def layer_prefix(self, layer: int) -> str:
        return f"{self.layers}.{layer}."

    def projection(self, layer: int, name: str) -> str:
        """Full name of a projection of one block, e.g. ``model.layers.3.mlp.up_proj``, or of its norms."""
        if name.endswith("_norm"):
            return f"{self.layer_prefix(layer)}{getattr(self, name)}"
        parent = self.attention if name == "o_proj" else self.mlp
        return f"{self.layer_prefix(layer)}{parent}.{getattr(self, name)}"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model; enough to count its parameters and FLOPs exactly."""

    family: Family
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    def sliced(self, channels: int = 0, layers: int = 0) -> "ModelShape":
        """The shape after each block lost ``channels`` channels and ``layers`` blocks went."""
        return replace(
            self,
            intermediate_size=self.intermediate_size - channels,
            num_hidden_layers=self.num_hidden_layers - layers,
        )

    @property
    def attention_matrix_parameters(self) -> int:
        """Weights of q, k, v and o of one block."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return self.hidden_size * (2 * query + 2 * key)

    @property
    def mlp_matrix_parameters(self) -> int:
        """Weights of gate, up and down projections of one block."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def stream_matrix_parameters(self) -> int:
        """Weights of one block that its residual stream goes through."""
        return self.family.stream_matrices * self.hidden_size**2

    @property
    def block_parameters(self) -> int:
        """All parameters of one block."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = self.attention_matrix_parameters + self.mlp_matrix_parameters
        layer += self.family.norms_per_layer * self.hidden_size
        if self.family.qk_norm:
            layer += 2 * self.head_dim
        if self.family.qkv_bias:
            layer += query + 2 * key
        elif self.attention_bias:
            layer += query + 2 * key + self.hidden_size
        if self.mlp_bias:
            layer += 2 * self.intermediate_size + self.hidden_size
        return layer + self.stream_matrix_parameters

    @property
    def embedding_parameters(self) -> int:
        """Of the input or the output embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters, tied embeddings counted once."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return embeddings + self.num_hidden_layers * self.block_parameters + self.hidden_size

    def flops_per_token(self, context_tokens: int = 0, output_head: bool = True) -> int:
        """FLOPs of one token's forward pass: two per weight of every matrix product.

        Args:
            context_tokens: tokens attended to; their dot products cost ``4 * heads * head_dim`` each per block.
            output_head: count the product with the output embedding.
        """
        layer = 2 * (self.attention_matrix_parameters + self.mlp_matrix_parameters + self.stream_matrix_parameters)
        layer += 4 * self.num_attention_heads * self.head_dim * context_tokens
        head = 2 * self.vocab_size * self.hidden_size if output_head else 0
        return self.num_hidden_layers * layer + head


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def shape_from_config(values: dict[str, Any], families: dict[str, Family], where: str) -> ModelShape:
    """The shape that a ``config.json`` describes.

    Raises:
        UnsupportedModelError: the family is not among ``families``, or a size is missing.
    """
    model_type = values.get("model_type")
    experts = next((key for key in _EXPERT_COUNTS if (values.get(key) or 0) > 1), None)
    if experts:
        raise UnsupportedModelError(
            f"{where}: model type {model_type!r} is a mixture of experts ({experts} is {values[experts]}), and which "
            "channels its experts can do without depends on what the router sends them; only dense models are "
            f"supported: {', '.join(sorted(families))}"
        )
    family = families.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(
            f"{where}: model type {model_type!r} is not supported; supported are {', '.join(sorted(families))}"
        )
    try:
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        return ModelShape(
            family=family,
            hidden_size=hidden,
            intermediate_size=int(values["intermediate_size"]),
            num_hidden_layers=int(values["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or hidden // heads),
            vocab_size=int(values["vocab_size"]),
            tied=bool(values.get("tie_word_embeddings", family.tied_by_default)),
            attention_bias=bool(values.get("attention_bias", False)),
            mlp_bias=bool(values.get("mlp_bias", False)),
        )
    except KeyError as error:
        raise UnsupportedModelError(f"{where}: the model's configuration lacks {error}") from None


def read_config_json(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a local checkpoint; raises :class:`UnsupportedModelError` naming the path."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UnsupportedModelError(
            f"{path} does not exist: {folder} is not a Hugging Face checkpoint; name a folder that has one"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise UnsupportedModelError(f"{path}: cannot be read: {error}") from None
