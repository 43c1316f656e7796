"""What a vLLM engine holds on each GPU that it has, in bytes, and how many sequences it has room for."""

from dataclasses import dataclass

from ptl_rl.families import ModelShape
from ptl_rl.planning.hardware import GIB
from ptl_rl.planning.trainer_memory import Parts

BATCHED_TOKENS = 8192
"""Of one forward pass: vLLM's and verl's default."""
GRAPHS_GIB = 1.5
"""CUDA graphs, NCCL's buffers and what else vLLM keeps beside weights, activations and cache."""
CPU_CACHE_GIB = 1.0
"""VLLM_CPU_KVCACHE_SPACE, as ``ptl_rl/cpu/checks.py`` sets it."""


@dataclass(frozen=True)
class Engine:
    """One vLLM engine."""

    shape: ModelShape
    value_bytes: int
    tensor_parallel: int
    length: int
    """Longest sequence, prompt and response."""
    sequences: int
    """Most that it answers at the same time."""

    @property
    def weights(self) -> float:
        return self.value_bytes * self.shape.parameters / self.tensor_parallel

    @property
    def cache_per_token(self) -> float:
        """Keys and values of one token, on one GPU."""
        shape = self.shape
        heads = max(1.0, shape.num_key_value_heads / self.tensor_parallel)
        return 2.0 * self.value_bytes * shape.num_hidden_layers * heads * shape.head_dim

    def _work(self, parallel: int) -> float:
        """Activations of one pass, shared by so many GPUs, and the sampler's copies of the last tokens' logits."""
        width = 4 * self.shape.hidden_size + 3 * self.shape.intermediate_size / parallel
        return self.value_bytes * width * BATCHED_TOKENS + 3 * 4.0 * self.sequences * self.shape.vocab_size

    def on_gpu(self, allowed: float) -> tuple[Parts, float]:
        """What it fills ``allowed`` bytes with, and how many sequences of full length its cache then has room for."""
        work = self._work(self.tensor_parallel) + GRAPHS_GIB * GIB
        cache = allowed - self.weights - work
        parts = {"vLLM weights": self.weights, "vLLM work": work, "KV cache": max(0.0, cache)}
        return parts, cache / (self.cache_per_token * self.length)

    def on_cpu(self) -> tuple[Parts, float]:
        """The same on CPUs, where the cache has a fixed size."""
        room = CPU_CACHE_GIB * GIB / (self.cache_per_token * self.length)
        return {"vLLM weights": self.weights, "vLLM work": self._work(1), "KV cache": CPU_CACHE_GIB * GIB}, room
