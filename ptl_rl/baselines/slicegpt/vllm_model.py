"""The same for vLLM, out of its tree; weights are loaded by vLLM's own Llama."""

import torch
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM


class SliceGptLlamaDecoderLayer(LlamaDecoderLayer):
    """vLLM carries a block's output and the stream apart, and adds them in the next norm: the stream alone turns."""

    def __init__(self, vllm_config, prefix: str = "", config=None) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=config)
        width = self.hidden_size
        self.attn_shortcut = ReplicatedLinear(width, width, bias=False, prefix=f"{prefix}.attn_shortcut")
        self.mlp_shortcut = ReplicatedLinear(width, width, bias=False, prefix=f"{prefix}.mlp_shortcut")

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of tokens (T,), and what is to be added to the stream and the stream before it, (T, hidden_size) both."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        residual, _ = self.attn_shortcut(residual)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        residual, _ = self.mlp_shortcut(residual)
        return hidden_states, residual


class SliceGptLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, *, vllm_config, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SliceGptLlamaDecoderLayer)
