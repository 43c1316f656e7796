"""A Llama whose residual connections change the basis, for transformers."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ptl_rl.baselines.slicegpt import MODEL_TYPE


class SliceGptLlamaConfig(LlamaConfig):
    """As Llama's; ``hidden_size`` is the sliced stream's and ``head_dim`` stays the original's."""

    model_type = MODEL_TYPE

    def validate_architecture(self) -> None:
        """Llama's own wants a hidden size that the heads divide, but these heads keep the original's size."""


class SliceGptLlamaDecoderLayer(LlamaDecoderLayer):
    """One block: behind attention and FFN the stream is taken to the next place's basis."""

    def __init__(self, config: SliceGptLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width = config.hidden_size
        self.attn_shortcut = nn.Linear(width, width, bias=False)
        self.mlp_shortcut = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: torch.Tensor, **options) -> torch.Tensor:
        """Of a stream of (B, T, hidden_size); ``options`` are those of Llama's attention."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        hidden_states = self.attn_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


class SliceGptLlamaForCausalLM(LlamaForCausalLM):
    config_class = SliceGptLlamaConfig
    _no_split_modules = ["SliceGptLlamaDecoderLayer"]  # noqa: RUF012  (transformers' own form)

    def __init__(self, config: SliceGptLlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(
            SliceGptLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.post_init()
