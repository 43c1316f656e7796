"""Rotate and slice the residual stream of a model, one place after the other, each on what the places before it leave.

In one process: the model, one place's covariance and the calibration tokens' streams in float32 are held on the device
(8 B parameters in bfloat16: 16 GB, and 0.5 GB for 32 thousand tokens of 4096 units), the sliced model in host memory.
Bases, streams and products are float32 whatever the model's type; each new weight is rounded once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ptl_rl.baselines.slicegpt import FAMILIES
from ptl_rl.baselines.slicegpt.modeling import SliceGptLlamaConfig, SliceGptLlamaForCausalLM
from ptl_rl.errors import UserError
from ptl_rl.pruning.score.calibration import Batch


class SliceGptError(UserError, ValueError):
    """A model that this method cannot be used on; the message says why."""


def check(config: Any) -> None:
    """Raise :class:`SliceGptError` for a model that cannot be written as a rotated Llama."""
    kind = config.model_type
    if kind in ("gemma2", "gemma3_text"):
        raise SliceGptError(
            f"{kind} norms what its blocks add to the stream, with a weight per unit: such a norm cannot be rotated, "
            f"so SliceGPT has no form for it; it takes {', '.join(FAMILIES)}"
        )
    if kind not in FAMILIES:
        raise SliceGptError(f"SliceGPT is here for {', '.join(FAMILIES)}, not for {kind}")
    types = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if types or (kind == "mistral" and config.sliding_window is not None):
        raise SliceGptError("SliceGPT is here for full attention only, and this model has sliding windows")
    if config.hidden_act != "silu":
        raise SliceGptError(f"SliceGPT is here for the activation silu, not {config.hidden_act}")


def sliced_config(config: Any, hidden_size: int) -> SliceGptLlamaConfig:
    """Of the sliced model, from the original's."""
    names = (
        "vocab_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return SliceGptLlamaConfig(
        **{name: getattr(config, name) for name in names},
        hidden_size=hidden_size,
        head_dim=head_dim,
        attention_bias=config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        tie_word_embeddings=False,  # the head is read in another basis than the embeddings are written in
    )


@dataclass
class _Streams:
    """The sliced residual streams of all calibration batches at one place, and the basis that they are in.

    ``sliced`` are (B, T, S), S the sliced size; ``basis_HS`` has orthonormal columns; all float32.
    """

    sliced: list[torch.Tensor]
    basis_HS: torch.Tensor

    def whole(self, index: int) -> torch.Tensor:
        """A batch's stream in the original's basis, (B, T, H), in so far as it is left."""
        return self.sliced[index] @ self.basis_HS.T


Basis = Callable[[list[torch.Tensor], list[torch.Tensor], int], torch.Tensor]
"""From streams (B, T, H), their masks (B, T) and a size S to orthonormal columns (H, S)."""


def principal_basis(streams: list[torch.Tensor], masks: list[torch.Tensor], size: int) -> torch.Tensor:
    """The ``size`` leading principal components of streams (B, T, H), as the columns of (H, size).

    Args:
        masks: (B, T), 1 for tokens that count.
    """
    width = streams[0].shape[-1]
    covariance_HH = torch.zeros(width, width, dtype=torch.float64, device=streams[0].device)
    for stream_BTH, mask_BT in zip(streams, masks, strict=True):
        counted_NH = stream_BTH[mask_BT.bool()].double()
        covariance_HH += counted_NH.T @ counted_NH
    _, vectors_HH = torch.linalg.eigh(covariance_HH)  # ascending
    return vectors_HH.flip(-1)[:, :size].float()


@torch.no_grad()
def slice_stream(
    model: PreTrainedModel,
    batches: list[Batch],
    hidden_size: int,
    *,
    basis: Basis | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SliceGptLlamaForCausalLM:
    """A rotated model whose stream has ``hidden_size`` units; with the original's it gives the original's logits.

    Args:
        batches: calibration tokens.
        basis: of every place; default: :func:`principal_basis`.
        progress: called with blocks done and blocks to do.

    Raises:
        SliceGptError: the model is of no form that can be rotated, or ``hidden_size`` is larger than its own.
    """
    check(model.config)
    if not 0 < hidden_size <= model.config.hidden_size:
        raise SliceGptError(f"a stream of {model.config.hidden_size} units cannot be cut to {hidden_size}")
    base: Any = model.model
    layers = base.layers
    # Rows that only fill a batch up have a token that is to be attended to, and does not count.
    masks = [batch.mask_BT * batch.is_sequence_B[:, None].to(batch.mask_BT) for batch in batches]
    target = _empty_target(model, hidden_size)

    embedded, options = [], []
    for batch in batches:
        stream, given = _first_block_inputs(model, batch)
        embedded.append(stream.float())
        options.append(given)
    choose = basis or principal_basis
    streams = _turned(embedded, choose(embedded, masks, hidden_size))
    target.model.embed_tokens.weight.copy_(base.embed_tokens.weight.float() @ streams.basis_HS)
    for index, (block, new) in enumerate(zip(layers, target.model.layers, strict=True)):
        streams = _attention(block, new, streams, masks, options, choose)
        streams = _ffn(block, new, streams, masks, choose)
        progress(index + 1, len(layers))
    _set_norm(target.model.norm, model.config.hidden_size)
    head: Any = model.get_output_embeddings()
    target.lm_head.weight.copy_((head.weight.float() * base.norm.weight.float()) @ streams.basis_HS)
    return target.eval()


def _empty_target(model: PreTrainedModel, hidden_size: int) -> SliceGptLlamaForCausalLM:
    """The sliced model in host memory, its weights yet to be written, and nothing spent on drawing any."""
    config = sliced_config(model.config, hidden_size)
    with torch.device("meta"):
        target = SliceGptLlamaForCausalLM(config).to(model.dtype)
    target.to_empty(device="cpu")
    target.model.rotary_emb = type(target.model.rotary_emb)(config)  # its frequencies are no weights, but computed
    return target


class _Caught(Exception):
    pass


def _first_block_inputs(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the first block would read: the stream, and masks and positions, which are the same for every block."""
    found: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def catch(_block: nn.Module, args: tuple, options: dict[str, Any]) -> None:
        found.append((args[0], {**options, "past_key_values": None, "use_cache": False}))
        raise _Caught

    handle = model.get_submodule("model.layers.0").register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)
    except _Caught:
        pass
    finally:
        handle.remove()
    return found[0]


def _attention(
    block: Any,
    new: Any,
    streams: _Streams,
    masks: list[torch.Tensor],
    options: list[dict[str, Any]],
    choose: Basis,
) -> _Streams:
    def added(index: int) -> torch.Tensor:
        normed = block.input_layernorm(streams.whole(index).to(old_dtype))
        return block.self_attn(hidden_states=normed, **options[index])[0]

    old_dtype = block.input_layernorm.weight.dtype

    behind = _behind(streams, masks, choose, added)
    readers = [
        (getattr(block.self_attn, name), getattr(new.self_attn, name)) for name in ("q_proj", "k_proj", "v_proj")
    ]
    _set(block.input_layernorm, new.input_layernorm, readers, streams.basis_HS)
    _set_writer(block.self_attn.o_proj, new.self_attn.o_proj, behind.basis_HS)
    new.attn_shortcut.weight.copy_(behind.basis_HS.T @ streams.basis_HS)
    return behind


def _ffn(block: Any, new: Any, streams: _Streams, masks: list[torch.Tensor], choose: Basis) -> _Streams:
    def added(index: int) -> torch.Tensor:
        return block.mlp(block.post_attention_layernorm(streams.whole(index).to(old_dtype)))

    old_dtype = block.post_attention_layernorm.weight.dtype
    behind = _behind(streams, masks, choose, added)
    readers = [(getattr(block.mlp, name), getattr(new.mlp, name)) for name in ("gate_proj", "up_proj")]
    _set(block.post_attention_layernorm, new.post_attention_layernorm, readers, streams.basis_HS)
    _set_writer(block.mlp.down_proj, new.mlp.down_proj, behind.basis_HS)
    new.mlp_shortcut.weight.copy_(behind.basis_HS.T @ streams.basis_HS)
    return behind


def _behind(
    streams: _Streams, masks: list[torch.Tensor], choose: Basis, added: Callable[[int], torch.Tensor]
) -> _Streams:
    """The streams behind what ``added`` adds to each, in their own basis; those before are gone, a batch at a time."""
    kept = streams.sliced
    for index in range(len(kept)):
        kept[index] = streams.whole(index) + added(index).float()
    return _turned(kept, choose(kept, masks, streams.basis_HS.shape[1]))


def _turned(whole: list[torch.Tensor], basis_HS: torch.Tensor) -> _Streams:
    """Streams (B, T, H) in a basis; takes the place of the list's own, a batch at a time."""
    for index, stream_BTH in enumerate(whole):
        whole[index] = stream_BTH @ basis_HS
    return _Streams(whole, basis_HS)


def _set(old_norm: Any, new_norm: Any, readers: list[tuple[Any, Any]], basis_HS: torch.Tensor) -> None:
    """Norm, and the projections that read it: they take over its weight."""
    _set_norm(new_norm, basis_HS.shape[0])
    for old, new in readers:
        new.weight.copy_((old.weight.float() * old_norm.weight.float()) @ basis_HS)
        _copy_bias(old, new, None)


def _set_norm(norm: Any, width: int) -> None:
    """The mean is over fewer units than the original's, of the same length."""
    norm.weight.fill_((width / norm.weight.numel()) ** 0.5)


def _set_writer(old: Any, new: Any, basis_HS: torch.Tensor) -> None:
    new.weight.copy_(basis_HS.T @ old.weight.float())
    _copy_bias(old, new, basis_HS)


def _copy_bias(old: Any, new: Any, basis_HS: torch.Tensor | None) -> None:
    if new.bias is None:
        return
    if old.bias is None:
        new.bias.zero_()
    else:
        new.bias.copy_(old.bias if basis_HS is None else old.bias.float() @ basis_HS)
