"""What the pruning engine must know of a model family, and the arithmetic of a model's size, without torch.

A family is data: names of modules and a few facts about biases and norms. ``ptl plan`` needs only the ``config.json``.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptl_rl.errors import UserError, what_stands_there


class UnsupportedModelError(UserError, ValueError):
    """A model this project cannot prune; the message says why and lists what it can."""


@dataclass(frozen=True)
class Family:
    """Names and facts of one Hugging Face architecture with a gated feed-forward network.

    ``layers`` and the projections are module paths; ``per_layer_fields`` are config lists with one entry per block,
    which must follow the blocks that are kept.
    """

    model_type: str
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Of every block, as wide as the residual stream."""
    qk_norm: bool = False
    qkv_bias: bool = False
    """Biases on q, k and v whatever the config says (Qwen2); otherwise ``attention_bias`` decides, for o too."""
    bias_keys: tuple[str, ...] = ()
    """Keys of the configuration that the family's code obeys: ``attention_bias``, ``mlp_bias``."""
    head_dim: int | None = None
    key_value_heads: int | None = None
    """Where the configuration does not speak of them; None: hidden units per head, and as many as heads."""
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
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
    stream_matrices: tuple[str, ...] = ()
    """Square matrices of a block that its residual stream goes through (SliceGPT)."""
    prunable: bool = True
    tied_by_default: bool = False
    """Input and output embeddings are one where the configuration does not say (Gemma)."""
    capped_by_default: bool = False
    """Attention logits have a soft cap where the configuration does not say (Gemma 2)."""

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
        return len(self.family.stream_matrices) * self.hidden_size**2

    def block_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one block's tensors, by their names within the block."""
        family, hidden, width = self.family, self.hidden_size, self.intermediate_size
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        names = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden)}
        attention = names | {family.o_proj: (hidden, query)}
        mlp = {family.gate_proj: (width, hidden), family.up_proj: (width, hidden), family.down_proj: (hidden, width)}
        biased = attention if self.attention_bias else names if family.qkv_bias else {}
        found: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in family.norms}
        found |= {f"{name}.weight": (hidden, hidden) for name in family.stream_matrices}
        found |= {f"{family.attention}.{name}.weight": shape for name, shape in attention.items()}
        found |= {f"{family.attention}.{name}.bias": shape[:1] for name, shape in biased.items()}
        if family.qk_norm:
            found |= {f"{family.attention}.{name}.weight": (self.head_dim,) for name in ("q_norm", "k_norm")}
        found |= {f"{family.mlp}.{name}.weight": shape for name, shape in mlp.items()}
        if self.mlp_bias:
            found |= {f"{family.mlp}.{name}.bias": shape[:1] for name, shape in mlp.items()}
        return found

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that a checkpoint has, by name; a tied output head is none."""
        family, block = self.family, self.block_tensors()
        found: dict[str, tuple[int, ...]] = {f"{family.embeddings}.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            found |= {family.layer_prefix(layer) + name: shape for name, shape in block.items()}
        found[f"{family.final_norm}.weight"] = (self.hidden_size,)
        if not self.tied:
            found[f"{family.head}.weight"] = (self.vocab_size, self.hidden_size)
        return found

    @property
    def block_parameters(self) -> int:
        """All parameters of one block."""
        return sum(map(math.prod, self.block_tensors().values()))

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
        UnsupportedModelError: the family is not among ``families``, or a size is missing or cannot be one.
    """
    model_type = values.get("model_type")
    experts = next((key for key in _EXPERT_COUNTS if values.get(key) not in (None, 0, 1)), None)
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

    def size(key: str, default: int | None = None) -> int:
        found = values.get(key, default)
        if found is None:
            found = default
        if type(found) is not int or found < 1:
            what = "lacks" if key not in values else f"has {str(found)[:40]!r} as"
            raise UnsupportedModelError(f"{where}: the model's configuration {what} {key!r}, a whole number above 0")
        return found

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    default_heads = None if values.get("num_key_value_heads", 0) is None else family.key_value_heads
    default_dim = None if values.get("head_dim", 0) is None else family.head_dim
    head_dim = size("head_dim", default_dim or hidden // heads)
    key_value_heads = size("num_key_value_heads", default_heads or heads)
    if heads % key_value_heads:
        raise UnsupportedModelError(
            f"{where}: the model's configuration has {heads} attention heads for {key_value_heads} key-value heads, "
            "which do not divide them"
        )
    size("max_position_embeddings", 1)
    return ModelShape(
        family=family,
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=size("vocab_size"),
        tied=bool(values.get("tie_word_embeddings", family.tied_by_default)),
        attention_bias="attention_bias" in family.bias_keys and bool(values.get("attention_bias")),
        mlp_bias="mlp_bias" in family.bias_keys and bool(values.get("mlp_bias")),
    )


def read_config_json(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a local checkpoint; raises :class:`UnsupportedModelError` naming the path."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise UnsupportedModelError(
            f"{path} does not exist: {folder} is not a Hugging Face checkpoint; name a folder that has one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = what_stands_there(path) or f"cannot be read: {error}"
        raise UnsupportedModelError(f"{path}: {reason}") from None
    if not isinstance(values, dict):
        raise UnsupportedModelError(f"{path}: holds {str(values)[:40]}, not a model's settings; download it again")
    return values
