"""What a text-only model in vLLM on Hopper GPUs does not load, and ``--slim`` leaves out.

Read in vLLM 0.24.0 and verl 0.9.1: every import of these is inside the function that needs it, or behind a check that
it is there. What needs it is named beside it.
"""

import re

# Package: what would need it. Sizes are those of the installed files.
PACKAGES = {
    "flashinfer-cubin": "kernels for Blackwell (1890 MB); without them and nvcc vLLM does not use flashinfer",
    "tokenspeed-mla": "latent attention (DeepSeek) on Blackwell (3 MB)",
    "tokenspeed-triton": "only tokenspeed-mla (300 MB)",
    "tilelang": "hyper-connections of DeepSeek V4 (172 MB)",
    "z3-solver": "only tilelang (69 MB)",
    "humming-kernels": "weights quantised to odd formats (1 MB)",
    "cuda-tile": "flashinfer's kernels for Blackwell (1 MB)",
    "nvidia-cuda-tileiras": "only cuda-tile (95 MB)",
    "nvidia-cuda-nvcc": "only cuda-tile and humming-kernels (141 MB)",
    "nvidia-cuda-crt": "only nvidia-cuda-nvcc (1 MB)",
    "nvidia-nvvm": "only nvidia-cuda-nvcc and cuda-tile (147 MB)",
    "quack-kernels": "FlashAttention 4 and linear attention (1 MB)",
    "nvidia-cutlass-dsl": "FlashAttention 4 and linear attention (none of its own)",
    "nvidia-cutlass-dsl-libs-base": "only nvidia-cutlass-dsl (186 MB)",
    "nvidia-cutlass-dsl-libs-cu13": "only nvidia-cutlass-dsl (197 MB)",
}

# Package, files in its wheel, what would need them.
FILES = [
    ("vllm", r"vllm/vllm_flash_attn/_vllm_fa2_C\..*", "FlashAttention 2, for Ampere; Hopper uses 3 (191 MB)"),
    ("vllm", r"vllm/vllm-rs", "the HTTP front end in Rust, used when VLLM_USE_RUST_FRONTEND=1 (37 MB)"),
]


def is_left_out(package: str, python: str, path: str) -> bool:
    """Whether the file ``path`` of a wheel of ``package`` goes, for Python ``python`` (``"3.12"``)."""
    other = re.search(r"\.cpython-(\d+)-[^/]*\.so$", path)
    if other is not None and other[1] != python.replace(".", ""):
        return True
    return any(package == name and re.fullmatch(pattern, path) for name, pattern, _ in FILES)


def touches(package: str) -> bool:
    """Whether ``FILES`` has files of the package."""
    return any(package == name for name, _, _ in FILES)
