"""The policy reads reasoning sequences once, and hooks hand its channels, weighted by position, to what adds them up.

Nothing per token is kept, so the cost is one forward pass and a few vectors per block, whatever the corpus; with
``sensitivity``, one backward pass more, and one batch's activations.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ptl_rl.families import Family
from ptl_rl.pruning.criteria import Statistics


@dataclass(frozen=True)
class Sequence:
    """Question plus chain of thought, as token ids."""

    ids: list[int]
    prompt_tokens: int
    """How many of the ids belong to the prompt."""


class Batch(NamedTuple):
    """Sequences of about equal length, padded on the right."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    """1 for real tokens; the attention mask."""
    weight_BT: torch.Tensor
    """How much each position counts: 1 where the next token is the response's, less in the prompt, 0 for padding."""
    writes_BT: torch.Tensor
    """1 where the next token is the response's, and there is one."""
    uniform_BT: torch.Tensor
    """Random numbers in [0, 1) that belong to the sequence, whatever batch and rank it comes to."""


def encode_sequences(tokenizer, questions: list[str], solutions: list[str], max_tokens: int) -> list[Sequence]:
    """Question plus chain of thought in the chat template, as in RL, cut at ``max_tokens``."""
    sequences = []
    for question, solution in zip(questions, solutions, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        ids = prompt + tokenizer.encode(solution, add_special_tokens=False) + [tokenizer.eos_token_id]
        sequences.append(Sequence(ids[:max_tokens], min(len(prompt), max_tokens)))
    return sequences


def batches_for_rank(
    sequences: list[Sequence], batch_size: int, rank: int, ranks: int, pad_token_id: int, prompt_weight: float
) -> Iterator[Batch]:
    """Batches of this rank's share; every rank gets equally many, the last may be all padding.

    FSDP2's collectives need the same number of forward passes on every rank; padded rows count nothing.
    """
    ordered = sorted(sequences, key=lambda sequence: len(sequence.ids))
    rounds = -(-len(ordered) // (batch_size * ranks))
    for index in range(rounds):
        window = ordered[index * batch_size * ranks : (index + 1) * batch_size * ranks]
        width = max(len(sequence.ids) for sequence in window)
        ids_BT = torch.full((batch_size, width), pad_token_id)
        mask_BT = torch.zeros((batch_size, width), dtype=torch.long)
        weight_BT, writes_BT, uniform_BT = (torch.zeros(batch_size, width) for _ in range(3))
        for row, sequence in enumerate(window[rank::ranks]):
            length, reading = len(sequence.ids), max(sequence.prompt_tokens - 1, 0)
            ids_BT[row, :length] = torch.tensor(sequence.ids)
            mask_BT[row, :length] = 1
            # The prompt's last position writes the response's first token, so it counts in full.
            weight_BT[row, :reading] = prompt_weight
            weight_BT[row, reading:length] = 1
            writes_BT[row, reading : length - 1] = 1
            seed = zlib.crc32(ids_BT[row, :length].numpy().tobytes())
            uniform_BT[row, :length] = torch.rand(length, generator=torch.Generator().manual_seed(seed))
        yield Batch(ids_BT, mask_BT, weight_BT, writes_BT, uniform_BT)


class Listener:
    """Adds up what it is handed; N positions of a batch, C channels."""

    def on_channels(self, layer: int, hidden_NC: torch.Tensor, weight_N: torch.Tensor) -> None:
        """The input of a block's ``down_proj`` and how much each position counts, float32."""

    def on_block(self, layer: int, change_N: torch.Tensor, weight_N: torch.Tensor) -> None:
        """Norm of what a block adds to the residual stream."""


SENSITIVITY_TEMPERATURE = 2.0
"""Flattens the policy's distribution before :func:`_surprise` draws from it."""


def _surprise(logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum over the response's positions of ``-log p`` of a token drawn from the policy's flattened distribution.

    Its gradient says at which positions, and how much, a change of what is written there can be felt: at temperature 1
    a confident policy would feel next to nothing.
    """
    logits_BTV = logits_BTV.float()
    with torch.no_grad():
        cumulative_BTV = (logits_BTV / SENSITIVITY_TEMPERATURE).softmax(-1).cumsum(-1)
        drawn_BT = (cumulative_BTV < batch.uniform_BT[..., None]).sum(-1).clamp_max(logits_BTV.shape[-1] - 1)
    log_p_BT = logits_BTV.log_softmax(-1).gather(-1, drawn_BT[..., None]).squeeze(-1)
    return -(log_p_BT * batch.writes_BT).sum()


class _Taps:
    """The hooks of one pass."""

    def __init__(self, listeners: list[Listener], sensitivity: bool) -> None:
        self.listeners, self.sensitivity = listeners, sensitivity
        self.weight_N = torch.zeros(0)
        self.hidden: dict[int, torch.Tensor] = {}

    def on_down_proj(self, layer: int, inputs: tuple, output: torch.Tensor) -> None:
        hidden_NC = inputs[0].detach().flatten(0, -2)
        if self.sensitivity:
            self.hidden[layer] = hidden_NC
            output.register_hook(lambda gradient: self._on_gradient(layer, gradient))
        else:
            self._hand_on(layer, hidden_NC, self.weight_N)

    def _on_gradient(self, layer: int, gradient_BTH: torch.Tensor) -> None:
        self._hand_on(layer, self.hidden.pop(layer), gradient_BTH.float().norm(dim=-1).flatten())

    @torch.no_grad()
    def _hand_on(self, layer: int, hidden_NC: torch.Tensor, weight_N: torch.Tensor) -> None:
        hidden_NC = hidden_NC.float()
        for listener in self.listeners:
            listener.on_channels(layer, hidden_NC, weight_N)

    @torch.no_grad()
    def on_block(self, layer: int, inputs: torch.Tensor, output) -> None:
        output_BTH = output[0] if isinstance(output, tuple) else output
        change_N = (output_BTH.float() - inputs.float()).flatten(0, 1).norm(dim=-1)
        for listener in self.listeners:
            listener.on_block(layer, change_N, self.weight_N)

    @contextmanager
    def on(self, model: nn.Module, family: Family) -> Iterator[None]:
        """Within this context the hooks are on ``model``."""
        handles = []
        for layer, block in enumerate(model.get_submodule(family.layers).children()):
            down_proj = block.get_submodule(f"{family.mlp}.{family.down_proj}")
            handles.append(
                down_proj.register_forward_hook(lambda _m, args, out, layer=layer: self.on_down_proj(layer, args, out))
            )
            handles.append(
                block.register_forward_hook(
                    lambda _m, args, kwargs, output, layer=layer: self.on_block(
                        layer, args[0] if args else kwargs["hidden_states"], output
                    ),
                    with_kwargs=True,
                )
            )
        if self.sensitivity:
            # The parameters are frozen, so gradients flow only if the embedded tokens ask for them.
            embeddings = model.get_submodule(family.embeddings)
            handles.append(embeddings.register_forward_hook(lambda _m, _args, output: output.requires_grad_()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def stream(
    model: nn.Module,
    family: Family,
    batches: Iterable[Batch],
    listeners: list[Listener],
    device: torch.device,
    *,
    sensitivity: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """One pass over ``batches`` that feeds ``listeners``.

    Args:
        model: with frozen parameters if ``sensitivity``.
        sensitivity: weigh a position's channels by the norm of the gradient that reaches the block's FFN output there,
            instead of by ``weight_BT``.
        progress: called with the number of batches read.
    """
    taps = _Taps(listeners, sensitivity)
    with taps.on(model, family):
        for done, on_host in enumerate(batches, 1):
            batch = Batch(*(tensor.to(device) for tensor in on_host))
            taps.weight_N = batch.weight_BT.flatten()
            inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, "use_cache": False}
            if sensitivity:
                with torch.enable_grad():
                    _surprise(model(**inputs).logits, batch).backward()
            else:
                with torch.no_grad():
                    # The root module gathers the embeddings, so it must be called; its logits are not needed.
                    model(**inputs, logits_to_keep=1)
            progress(done)


class Collector(Listener):
    """The sums that :class:`~ptl_rl.pruning.criteria.Statistics` consist of."""

    def __init__(self, model: nn.Module, family: Family, channels: int, device: torch.device) -> None:
        self.blocks = list(model.get_submodule(family.layers).children())
        self.family = family
        self.abs_sum_LC = torch.zeros(len(self.blocks), channels, dtype=torch.float64, device=device)
        self.square_sum_LC = torch.zeros_like(self.abs_sum_LC)
        self.channel_weight_L, self.change_sum_L, self.block_weight_L = (
            torch.zeros(len(self.blocks), dtype=torch.float64, device=device) for _ in range(3)
        )

    def on_channels(self, layer: int, hidden_NC: torch.Tensor, weight_N: torch.Tensor) -> None:
        self.abs_sum_LC[layer] += weight_N @ hidden_NC.abs()
        self.square_sum_LC[layer] += weight_N @ hidden_NC.square()
        self.channel_weight_L[layer] += weight_N.sum()

    def on_block(self, layer: int, change_N: torch.Tensor, weight_N: torch.Tensor) -> None:
        self.change_sum_L[layer] += change_N @ weight_N
        self.block_weight_L[layer] += weight_N.sum()

    def reduce(self) -> Statistics:
        """Sum over all ranks.

        Raises:
            ValueError: no position of any sequence has any weight.
        """
        down_square_LC = torch.zeros_like(self.square_sum_LC)
        for layer, block in enumerate(self.blocks):
            weight = block.get_parameter(f"{self.family.mlp}.{self.family.down_proj}.weight")
            local_HC: torch.Tensor = weight.to_local() if isinstance(weight, DTensor) else weight
            down_square_LC[layer] = local_HC.detach().double().square().sum(0)
        sums = [self.abs_sum_LC, self.square_sum_LC, self.channel_weight_L, self.change_sum_L, self.block_weight_L]
        if dist.is_initialized():
            for tensor in [*sums, down_square_LC]:
                dist.all_reduce(tensor)
        abs_LC, square_LC, channel_weight_L, change_L, block_weight_L = (tensor.cpu() for tensor in sums)
        if not (channel_weight_L.min() > 0 and block_weight_L.min() > 0):
            raise ValueError(
                "no token of the calibration sequences counts: calibration.max_tokens cuts every one of them before "
                "its solution begins, or their solutions are empty; raise it, or set calibration.token_weights to "
                "uniform and calibration.prompt_weight above 0"
            )
        return Statistics(
            abs_sum_LC=abs_LC,
            square_sum_LC=square_LC,
            channel_weight_L=channel_weight_L,
            down_norm_LC=down_square_LC.sqrt().cpu(),
            change_sum_L=change_L,
            block_weight_L=block_weight_L,
        )
