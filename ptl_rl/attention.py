"""Which attention a model's blocks run, where the recipe says ``auto``; the driver asks once, every stage is told.

Flash attention 2 reads the sequences of a batch one behind the other, without padding. All others read padded rows.
vLLM brings attention of its own, so none of this touches rollouts or evaluation. Imports torch in functions only.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ptl_rl.config import ConfigError
from ptl_rl.families import is_capped

FLASH = "flash_attention_2"
OLDEST_CAPABILITY = 8.0
"""Compute capability of the oldest GPUs that flash attention 2 runs on."""
OLDEST_FLASH = "2.6.3"
"""Of the package flash-attn: verl wants 2.4.3, a soft cap 2.6."""
REMEDY = (
    "install a flash-attn wheel built for this Python, torch and CUDA, or build it (pip install flash-attn "
    "--no-build-isolation, with the CUDA compiler nvcc), or set model.attention to auto"
)


@dataclass(frozen=True)
class Attention:
    """What the blocks run, and what to tell the user of it."""

    name: str
    """As transformers' ``attn_implementation`` takes it."""
    note: str | None = None


def without_flash(model_config: dict[str, Any]) -> str:
    """The attention of a model that flash attention cannot run: ``sdpa``, or ``eager`` where it has a soft cap.

    Args:
        model_config: the values of its ``config.json``. sdpa leaves Gemma 2's ``attn_logit_softcapping`` out.
    """
    return "eager" if is_capped(model_config) else "sdpa"


def flash_problem() -> str | None:
    """Why flash attention 2 cannot be used in this environment, whatever its GPUs; None if it can."""
    if find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    from packaging.version import Version

    try:
        found = version("flash-attn")
        if Version(found) < Version(OLDEST_FLASH):
            return f"flash-attn is {found}, older than {OLDEST_FLASH}"
        import flash_attn  # noqa: F401  (a wheel built for another torch fails here)
    except PackageNotFoundError:
        return "a module flash_attn is there, but not the package flash-attn"
    except (ImportError, OSError) as error:
        return f"flash-attn cannot be imported, as when it was built for another torch: {str(error).splitlines()[0]}"
    return None


def resolve_attention(
    setting: str, device: str, dtype: str, model_config: dict[str, Any], capability: float | None = None
) -> Attention:
    """What ``model.attention`` comes to on ``device`` ('cpu' or 'cuda').

    Args:
        capability: compute capability of the oldest GPU that is used, where it is known.
        dtype: ``model.dtype``; flash attention takes 16 bits only.
        model_config: the values of the model's ``config.json``.

    Raises:
        ConfigError: flash attention is asked for by name and cannot be had, or sdpa for a model with a soft cap.
    """
    plain = without_flash(model_config)
    if setting == "sdpa" != plain:
        raise ConfigError(
            "model.attention: sdpa leaves out the soft cap that this model has on its attention logits "
            "(attn_logit_softcapping), so it would compute something else; set it to auto, eager or flash_attention_2"
        )
    if setting not in ("auto", FLASH):
        return Attention(setting)
    if device == "cpu":
        if setting == FLASH:
            raise ConfigError(f"model.attention: {FLASH} has no CPU build; set it to auto, sdpa or eager")
        return Attention(plain)
    if dtype == "float32":
        if setting == FLASH:
            raise ConfigError(f"model.attention: {FLASH} computes in 16 bits only; set model.dtype to bfloat16")
        return Attention(plain)
    problem = flash_problem()
    if capability is not None and capability < OLDEST_CAPABILITY:
        problem = f"flash attention 2 wants GPUs of compute capability {OLDEST_CAPABILITY}, and here is {capability}"
    if problem is None:
        return Attention(FLASH)
    if setting == FLASH:
        raise ConfigError(f"model.attention: {FLASH}, but {problem}; {REMEDY}")
    return Attention(
        plain,
        f"model.attention is {plain}, as {problem}: batches are rows padded to their longest sequence, so memory and "
        "time go to padding (with answers of a third of the longest, about three times the tokens), and "
        "micro-batches hold a fixed number of rows; to do without, install flash-attn",
    )
