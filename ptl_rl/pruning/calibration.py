"""Streaming calibration statistics: hooks add up what the criteria need while the policy reads reasoning sequences.

Nothing per token is kept, so the cost is one forward pass and a few vectors per block, whatever the corpus.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
        weight_BT = torch.zeros(batch_size, width)
        for row, sequence in enumerate(window[rank::ranks]):
            length = len(sequence.ids)
            ids_BT[row, :length] = torch.tensor(sequence.ids)
            mask_BT[row, :length] = 1
            weight_BT[row, :length] = 1
            # The prompt's last position writes the response's first token, so it counts in full.
            weight_BT[row, : sequence.prompt_tokens - 1] = prompt_weight
        yield Batch(ids_BT, mask_BT, weight_BT)


class Listener(Protocol):
    """Something that hooks into the model and adds up what it sees."""

    def start_batch(self, weight_BT: torch.Tensor) -> None: ...

    def attached(self) -> AbstractContextManager[None]: ...


def stream(
    model: nn.Module,
    batches: Iterable[Batch],
    listeners: list[Listener],
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """One forward pass over ``batches`` with all ``listeners`` attached."""
    with torch.no_grad(), ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener.attached())
        for done, batch in enumerate(batches, 1):
            ids_BT, mask_BT, weight_BT = (tensor.to(device) for tensor in batch)
            for listener in listeners:
                listener.start_batch(weight_BT)
            # The root module gathers the embeddings, so it must be called; its logits are not needed.
            model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=1)
            progress(done)


class Collector:
    """Holds the sums and the hooks that fill them; use :meth:`attached` around the forward passes."""

    def __init__(self, model: nn.Module, family: Family, channels: int, device: torch.device) -> None:
        self.blocks = list(model.get_submodule(family.layers).children())
        self.family = family
        self.abs_sum_LC = torch.zeros(len(self.blocks), channels, dtype=torch.float64, device=device)
        self.square_sum_LC = torch.zeros_like(self.abs_sum_LC)
        self.change_sum_L = torch.zeros(len(self.blocks), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self._weight_N = torch.zeros(0, device=device)

    def start_batch(self, weight_BT: torch.Tensor) -> None:
        """Announce how much each position of the batch counts that the next forward pass reads."""
        self._weight_N = weight_BT.flatten()
        self.tokens += weight_BT.sum()

    def _on_channels(self, layer: int, inputs: tuple) -> None:
        hidden_NC = inputs[0].flatten(0, -2).float()
        self.abs_sum_LC[layer] += self._weight_N @ hidden_NC.abs()
        self.square_sum_LC[layer] += self._weight_N @ hidden_NC.square()

    def _on_block(self, layer: int, inputs: torch.Tensor, output) -> None:
        output_BTH = output[0] if isinstance(output, tuple) else output
        change_N = (output_BTH.float() - inputs.float()).flatten(0, 1).norm(dim=-1)
        self.change_sum_L[layer] += change_N @ self._weight_N

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are on the model within this context only."""
        handles = []
        for layer, block in enumerate(self.blocks):
            down_proj = block.get_submodule(f"{self.family.mlp}.{self.family.down_proj}")
            handles.append(
                down_proj.register_forward_pre_hook(lambda _m, inputs, layer=layer: self._on_channels(layer, inputs))
            )
            handles.append(
                block.register_forward_hook(
                    lambda _m, args, kwargs, output, layer=layer: self._on_block(
                        layer, args[0] if args else kwargs["hidden_states"], output
                    ),
                    with_kwargs=True,
                )
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def reduce(self) -> Statistics:
        """Sum over all ranks."""
        down_square_LC = torch.zeros_like(self.square_sum_LC)
        for layer, block in enumerate(self.blocks):
            weight = block.get_parameter(f"{self.family.mlp}.{self.family.down_proj}.weight")
            local_HC: torch.Tensor = weight.to_local() if isinstance(weight, DTensor) else weight
            down_square_LC[layer] = local_HC.detach().double().square().sum(0)
        sums = [self.abs_sum_LC, self.square_sum_LC, self.change_sum_L, self.tokens]
        if dist.is_initialized():
            for tensor in [*sums, down_square_LC]:
                dist.all_reduce(tensor)
        abs_LC, square_LC, change_L, tokens = (tensor.cpu() for tensor in sums)
        return Statistics(float(tokens), abs_LC, square_LC, down_square_LC.sqrt().cpu(), change_L)
