"""Streaming calibration statistics: hooks add up what the criteria need while the policy reads reasoning sequences.

Nothing per token is kept, so the cost is one forward pass and a few vectors per block, whatever the corpus.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ptl_rl.families import Family
from ptl_rl.pruning.criteria import Statistics


def encode_sequences(tokenizer, questions: list[str], solutions: list[str], max_tokens: int) -> list[list[int]]:
    """Token ids of question plus chain of thought in the chat template, as in RL, cut at ``max_tokens``."""
    sequences = []
    for question, solution in zip(questions, solutions, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        ids = prompt + tokenizer.encode(solution, add_special_tokens=False) + [tokenizer.eos_token_id]
        sequences.append(ids[:max_tokens])
    return sequences


def batches_for_rank(
    sequences: list[list[int]], batch_size: int, rank: int, ranks: int, pad_token_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids_BT, mask_BT) of this rank's share; every rank gets equally many batches, the last may be all padding.

    FSDP2's collectives need the same number of forward passes on every rank; masked rows count nothing.
    """
    ordered = sorted(sequences, key=len)
    rounds = -(-len(ordered) // (batch_size * ranks))
    for index in range(rounds):
        window = ordered[index * batch_size * ranks : (index + 1) * batch_size * ranks]
        own = window[rank::ranks]
        width = max(map(len, window))
        ids_BT = torch.full((batch_size, width), pad_token_id)
        mask_BT = torch.zeros((batch_size, width), dtype=torch.long)
        for row, ids in enumerate(own):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            mask_BT[row, : len(ids)] = 1
        yield ids_BT, mask_BT


class Listener(Protocol):
    """Something that hooks into the model and adds up what it sees."""

    def start_batch(self, mask_BT: torch.Tensor) -> None: ...

    def attached(self) -> AbstractContextManager[None]: ...


def stream(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    listeners: Sequence[Listener],
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """One forward pass over ``batches`` of (input_ids_BT, mask_BT) with all ``listeners`` attached."""
    with torch.no_grad(), ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener.attached())
        for done, (ids_BT, mask_BT) in enumerate(batches, 1):
            mask_BT = mask_BT.to(device)
            for listener in listeners:
                listener.start_batch(mask_BT)
            # The root module gathers the embeddings, so it must be called; its logits are not needed.
            model(input_ids=ids_BT.to(device), attention_mask=mask_BT, use_cache=False, logits_to_keep=1)
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
        self._mask_N1 = torch.zeros(0, 1, device=device)

    def start_batch(self, mask_BT: torch.Tensor) -> None:
        """Announce the mask of the batch that the next forward pass reads."""
        self._mask_N1 = mask_BT.reshape(-1, 1).float()
        self.tokens += mask_BT.sum()

    def _on_channels(self, layer: int, inputs: tuple) -> None:
        hidden_NC = inputs[0].flatten(0, -2).float() * self._mask_N1
        self.abs_sum_LC[layer] += hidden_NC.abs().sum(0)
        self.square_sum_LC[layer] += hidden_NC.square().sum(0)

    def _on_block(self, layer: int, inputs: torch.Tensor, output) -> None:
        output_BTH = output[0] if isinstance(output, tuple) else output
        change_N = (output_BTH.float() - inputs.float()).flatten(0, 1).norm(dim=-1)
        self.change_sum_L[layer] += change_N @ self._mask_N1.squeeze(1)

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
            down_square_LC[layer] = local_HC.double().square().sum(0)
        sums = [self.abs_sum_LC, self.square_sum_LC, self.change_sum_L, self.tokens]
        if dist.is_initialized():
            for tensor in [*sums, down_square_LC]:
                dist.all_reduce(tensor)
        abs_LC, square_LC, change_L, tokens = (tensor.cpu() for tensor in sums)
        return Statistics(float(tokens), abs_LC, square_LC, down_square_LC.sqrt().cpu(), change_L)
