"""SliceGPT (Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns").

A model whose norms stand in front of projections only, RMS norms with their weights folded into what follows, does not
care for an orthogonal change of basis of its residual stream. SliceGPT takes, at every norm, the basis of the principal
components of what is read there, and deletes the smallest: the stream gets narrower. As every place has a basis of its
own, the residual connections need a matrix each, so the result is no stock architecture: :mod:`.modeling` has it for
transformers, :mod:`.vllm_model` for vLLM.
"""

FAMILIES = ("llama", "mistral", "qwen2")
"""Those that a Llama with biases can express."""
MODEL_TYPE = "slicegpt_llama"
ARCHITECTURE = "SliceGptLlamaForCausalLM"
NOTE = "slicegpt.json"
"""In a sliced folder: what it was made of."""


def register() -> None:
    """Let transformers' ``Auto`` classes load such a folder. May be called again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ptl_rl.baselines.slicegpt.modeling import SliceGptLlamaConfig, SliceGptLlamaForCausalLM

    AutoConfig.register(MODEL_TYPE, SliceGptLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(SliceGptLlamaConfig, SliceGptLlamaForCausalLM, exist_ok=True)


def register_vllm() -> None:
    """Entry point of group ``vllm.general_plugins``: vLLM calls it in each of its processes."""
    from vllm import ModelRegistry

    register()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"ptl_rl.baselines.slicegpt.vllm_model:{ARCHITECTURE}")
