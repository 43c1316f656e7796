"""The export contract: what was written computes what the masked original computes."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ptl_rl.checkpoints.read import read_tensor
from ptl_rl.families import Family
from ptl_rl.pruning.masking import NewWeights, masked
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.slice.slicing import load_new_weight

EXPORT_TOLERANCE = 1e-3
"""Largest accepted difference; both models compute in float32."""


class ExportError(RuntimeError):
    """The written checkpoint does not compute what the masked model computes: a bug of this project."""


def check_difference(difference: float, written: Path) -> None:
    """Raise :class:`ExportError` if ``difference`` is more than rounding."""
    if not difference <= EXPORT_TOLERANCE:  # also where it is no number
        raise ExportError(
            f"{written}: logits differ from the masked model's by {difference:.2e} of the largest logit (at most "
            f"{EXPORT_TOLERANCE:g} is rounding). This is a bug of this project's family adapter, not of your input: "
            "do not use this folder, and report the model's config.json"
        )


CHECK_TOKENS = 128
"""Longest text that is compared."""


@torch.no_grad()
def logit_difference(
    load: Callable[[Path], nn.Module],
    family: Family,
    source: Path,
    plan: PruningPlan,
    written: Path,
    tokenizer,
    texts: list[str],
    new_weights: Path | None = None,
) -> float:
    """Largest difference of the written checkpoint's logits from the masked source's, relative to the largest logit.

    Args:
        load: gives the float32 model of a folder; no more than one is held.
        texts: what both read.
        new_weights: folder of the compensated weights that were to be written.
    """
    encoded = [tokenizer.encode(text)[:CHECK_TOKENS] for text in texts]
    width = min(map(len, encoded))
    model = load(source)
    device = next(model.parameters()).device
    ids_BT = torch.tensor([ids[:width] for ids in encoded], device=device)
    meant = _meant(family, plan, written, new_weights) if new_weights else None
    with masked(model, family, plan, meant):
        expected_BTV = model(input_ids=ids_BT, use_cache=False).logits
    del model
    gc.collect()  # FSDP modules refer to each other
    actual_BTV = load(written)(input_ids=ids_BT, use_cache=False).logits
    scale = expected_BTV.abs().max().clamp_min(1e-6)
    return float((actual_BTV - expected_BTV).abs().max() / scale)


def _meant(family: Family, plan: PruningPlan, written: Path, folder: Path) -> NewWeights:
    """The compensated weights, rounded to the type that the checkpoint is written in."""
    new_index = {old: new for new, old in enumerate(plan.keep_layers)}

    def read(layer: int, name: str) -> torch.Tensor | None:
        weight = load_new_weight(folder, layer, name)
        if weight is None:
            return None
        return weight.to(read_tensor(written, family.projection(new_index[layer], name) + ".weight").dtype)

    return read
