"""The model reads sequences once, and hooks hand what they see to listeners that add it up.

Nothing per token is kept, so the cost is one forward pass and a few vectors per block, whatever the corpus; where a
listener or the weights need gradients, one backward pass more, and one batch's activations.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ptl_rl.errors import UserError
from ptl_rl.families import Family
from ptl_rl.pruning.masking import hooked
from ptl_rl.pruning.score.calibration import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Listener:
    """Adds up what it is handed; N positions of a batch, B its sequences, C channels, H hidden size.

    Tensors are in the model's type and must not be kept or changed; weights are float32.
    """

    wants_gradients = False
    """Whether :meth:`on_gradient` is to be called, which costs a backward pass."""
    wants_last = False
    """Whether :meth:`on_last` is to be called."""
    wants_blocks = False
    """Whether :meth:`on_block` is to be called."""
    attention_of: int | None = None
    """The block whose ``o_proj`` inputs are to be handed to :meth:`on_attention`."""
    output_of: int | None = None
    """The block whose ``down_proj`` outputs are to be handed to :meth:`on_output`."""
    by_normed_output = False
    """Whether, where a block norms its FFN's output, :meth:`on_channels` is to be handed weights over that output's
    mean square: a change of the output then counts as it reaches the residual stream."""

    def on_channels(self, layer: int, hidden_NC: torch.Tensor, weight_N: torch.Tensor) -> None:
        """The input of a block's ``down_proj`` and how much each position counts."""

    def on_gradient(self, layer: int, hidden_NC: torch.Tensor, gradient_NC: torch.Tensor) -> None:
        """The same input and the loss's gradient with respect to it."""

    def on_last(self, layer: int, hidden_BC: torch.Tensor) -> None:
        """The same input at the last token of every sequence."""

    def on_attention(self, layer: int, heads_NA: torch.Tensor) -> None:
        """The input of a block's ``o_proj``; comes before the block's :meth:`on_channels`."""

    def on_output(self, layer: int, output_NH: torch.Tensor) -> None:
        """The output of a block's ``down_proj``; comes before the block's :meth:`on_channels`."""

    def on_block(self, layer: int, inputs_NH: torch.Tensor, outputs_NH: torch.Tensor, weight_N: torch.Tensor) -> None:
        """The residual stream before and after a block."""


class CalibrationError(UserError, ValueError):
    """Calibration settings with which nothing can be scored; the message names them."""


NOTHING_COUNTS = (
    "no token of the calibration sequences counts: calibration.max_tokens cuts every one of them before its solution "
    "begins, or their solutions are empty; raise it, or set calibration.token_weights to uniform and "
    "calibration.prompt_weight above 0"
)
SENSITIVITY_TEMPERATURE = 2.0
"""Flattens the model's distribution before :func:`_surprise` draws from it."""


def _surprise(logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum over the response's positions of ``-log p`` of a token drawn from the model's flattened distribution.

    Its gradient says at which positions, and how much, a change of what is written there can be felt: at temperature 1
    a confident model would feel next to nothing.
    """
    logits_BTV = logits_BTV.float()
    with torch.no_grad():
        cumulative_BTV = (logits_BTV / SENSITIVITY_TEMPERATURE).softmax(-1).cumsum(-1)
        drawn_BT = (cumulative_BTV < batch.uniform_BT[..., None]).sum(-1).clamp_max(logits_BTV.shape[-1] - 1)
    log_p_BT = logits_BTV.log_softmax(-1).gather(-1, drawn_BT[..., None]).squeeze(-1)
    return -(log_p_BT * batch.writes_BT).sum()


def negative_log_likelihood(logits_BTV: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of ``-log p`` of the sequences' own tokens, and the sum of the weights."""
    weight_BS = batch.weight_BT[:, :-1] * batch.mask_BT[:, 1:]
    losses_B = [
        # One sequence at a time: without gradients, no more than one float32 copy of its logits is held.
        nn.functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none") @ weight_S
        for logits_TV, ids_T, weight_S in zip(logits_BTV, batch.ids_BT, weight_BS, strict=True)
    ]
    return torch.stack(losses_B).sum(), weight_BS.sum()


class _Taps:
    """The hooks of one pass."""

    def __init__(self, listeners: list[Listener], sensitivity: bool) -> None:
        self.listeners, self.sensitivity = listeners, sensitivity
        self.for_gradient = [listener for listener in listeners if listener.wants_gradients]
        self.for_last = [listener for listener in listeners if listener.wants_last]
        self.for_block = [listener for listener in listeners if listener.wants_blocks]
        self.weight_N = torch.zeros(0)
        self.last_B = torch.zeros(0, dtype=torch.long)
        self.hidden: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.embedded_BTH = torch.zeros(0)

    def begin(self, batch: Batch) -> None:
        """Get ready for a batch's forward pass."""
        self.hidden.clear()
        self.weight_N = batch.weight_BT.flatten()
        length_B = batch.mask_BT.sum(-1)
        start_B = torch.arange(len(length_B), device=length_B.device) * batch.mask_BT.shape[1]
        self.last_B = (start_B + length_B - 1)[batch.is_sequence_B]

    def on_down_proj(self, layer: int, inputs: tuple, output: torch.Tensor, eps: float | None) -> None:
        """``eps`` is that of the norm that the output goes through, None without one."""
        hidden_NC = inputs[0].detach().flatten(0, -2)
        if self.for_gradient:
            inputs[0].register_hook(lambda gradient: self._on_input_gradient(layer, hidden_NC, gradient))
        with torch.no_grad():
            for listener in self.for_last:
                listener.on_last(layer, hidden_NC[self.last_B])
            for listener in self.listeners:
                if listener.output_of == layer:
                    listener.on_output(layer, output.detach().flatten(0, -2))
        size_N = None
        if eps is not None and any(listener.by_normed_output for listener in self.listeners):
            size_N = (output.detach().float().square().mean(-1).flatten() + eps).sqrt()
        if self.sensitivity:
            self.hidden[layer] = hidden_NC, size_N
            output.register_hook(lambda gradient: self._on_output_gradient(layer, gradient))
        else:
            normed_weight_N = self.weight_N if size_N is None else self.weight_N / size_N.square()
            self._hand_on(layer, hidden_NC, self.weight_N, normed_weight_N)

    @torch.no_grad()
    def _on_input_gradient(self, layer: int, hidden_NC: torch.Tensor, gradient_BTC: torch.Tensor) -> None:
        for listener in self.for_gradient:
            listener.on_gradient(layer, hidden_NC, gradient_BTC.flatten(0, -2))

    def _on_output_gradient(self, layer: int, gradient_BTH: torch.Tensor) -> None:
        hidden_NC, size_N = self.hidden.pop(layer)
        weight_N = gradient_BTH.float().norm(dim=-1).flatten()
        # The gradient has come through the norm, if there is one, which has divided it by the output's size once.
        self._hand_on(layer, hidden_NC, weight_N, weight_N if size_N is None else weight_N / size_N)

    @torch.no_grad()
    def _hand_on(
        self, layer: int, hidden_NC: torch.Tensor, weight_N: torch.Tensor, normed_weight_N: torch.Tensor
    ) -> None:
        for listener in self.listeners:
            listener.on_channels(layer, hidden_NC, normed_weight_N if listener.by_normed_output else weight_N)

    def on_embeddings(self, _module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        """Where parameters are frozen, gradients flow only if the embedded tokens ask for them."""
        self.embedded_BTH = output.requires_grad_()

    def go_backward(self, loss: torch.Tensor) -> None:
        """Have the hooks see their gradients; those of weights, which nobody reads, are not computed."""
        torch.autograd.grad(loss, self.embedded_BTH)
        self.embedded_BTH = torch.zeros(0)

    @torch.no_grad()
    def on_o_proj(self, layer: int, inputs: tuple) -> None:
        for listener in self.listeners:
            if listener.attention_of == layer:
                listener.on_attention(layer, inputs[0].detach().flatten(0, -2))

    @torch.no_grad()
    def on_block(self, layer: int, inputs: torch.Tensor, output) -> None:
        output_BTH = output[0] if isinstance(output, tuple) else output
        for listener in self.for_block:
            listener.on_block(layer, inputs.detach().flatten(0, -2), output_BTH.detach().flatten(0, -2), self.weight_N)

    @contextmanager
    def on(self, model: nn.Module, family: Family) -> Iterator[None]:
        """Within this context the hooks are on ``model``."""
        handles = []
        wanted = {listener.attention_of for listener in self.listeners}
        for layer, block in enumerate(model.get_submodule(family.layers).children()):
            down_proj = block.get_submodule(f"{family.mlp}.{family.down_proj}")
            eps: Any = family.output_norm and block.get_submodule(family.output_norm).eps
            handles.append(
                down_proj.register_forward_hook(
                    lambda _m, args, out, layer=layer, eps=eps: self.on_down_proj(layer, args, out, eps)
                )
            )
            if layer in wanted:
                o_proj = block.get_submodule(f"{family.attention}.{family.o_proj}")
                handles.append(
                    o_proj.register_forward_hook(lambda _m, args, _o, layer=layer: self.on_o_proj(layer, args))
                )
            if self.for_block:
                handles.append(
                    block.register_forward_hook(
                        lambda _m, args, kwargs, output, layer=layer: self.on_block(
                            layer, args[0] if args else kwargs["hidden_states"], output
                        ),
                        with_kwargs=True,
                    )
                )
        if self.sensitivity or self.for_gradient:
            embeddings = model.get_submodule(family.embeddings)
            handles.append(embeddings.register_forward_hook(self.on_embeddings))
        with hooked(handles):
            yield


def inputs_of(batch: Batch) -> dict:
    """What a model's forward pass over ``batch`` takes."""
    return {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, "use_cache": False}


@contextmanager
def without_head(model: "PreTrainedModel") -> Iterator[None]:
    """Within this context ``model`` makes no logits, which nobody needs and which cost as much as several blocks.

    The root module must be called all the same: under FSDP2 it gathers the embeddings.
    """
    head: Any = model.get_output_embeddings()
    head.forward = lambda hidden_states: hidden_states
    try:
        yield
    finally:
        del head.forward


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    for batch in batches:
        yield Batch(*(tensor.to(device) for tensor in batch))


def stream(
    model: "PreTrainedModel",
    family: Family,
    batches: Iterable[Batch],
    listeners: list[Listener],
    device: torch.device,
    *,
    sensitivity: bool = False,
) -> None:
    """One pass over ``batches`` that feeds ``listeners``.

    Args:
        model: whose parameters may be frozen or not; they get no gradients.
        sensitivity: weigh a position's channels by the norm of the gradient that reaches the block's FFN output there,
            instead of by ``weight_BT``.

    Raises:
        ValueError: a listener wants the gradient of the sequences' likelihood, and ``sensitivity`` one of its own.
    """
    taps = _Taps(listeners, sensitivity)
    if sensitivity and taps.for_gradient:
        raise ValueError(
            "criterion.channels reads gradients of its own; set calibration.token_weights to uniform, not sensitivity"
        )
    with taps.on(model, family):
        for batch in on_device(batches, device):
            taps.begin(batch)
            if sensitivity or taps.for_gradient:
                with torch.enable_grad():
                    logits_BTV = model(**inputs_of(batch)).logits
                    loss = (
                        _surprise(logits_BTV, batch) if sensitivity else negative_log_likelihood(logits_BTV, batch)[0]
                    )
                    taps.go_backward(loss)
            else:
                with torch.no_grad(), without_head(model):
                    model(**inputs_of(batch))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> float:
    """Weighted mean ``-log p`` of the sequences' tokens over all ranks, in nats.

    Raises:
        CalibrationError: no position of any sequence has any weight.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in on_device(batches, device):
        loss, weight = negative_log_likelihood(model(**inputs_of(batch)).logits, batch)
        sums += torch.stack([loss, weight]).double()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    if not sums[1] > 0:
        raise CalibrationError(NOTHING_COUNTS)
    return float(sums[0] / sums[1])
