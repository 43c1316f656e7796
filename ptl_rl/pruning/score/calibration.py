"""What the model reads to be scored: batches of sequences, and how much each of their tokens counts."""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ptl_rl.data.encoding import Sequence


class Batch(NamedTuple):
    """Sequences of about equal length, padded on the right."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    """1 for real tokens, and for the first of a row without any; the attention mask."""
    weight_BT: torch.Tensor
    """How much each position counts: the sequence's weight where the next token is the response's, less in the prompt,
    0 for padding."""
    writes_BT: torch.Tensor
    """The sequence's weight where the next token is the response's, and there is one."""
    uniform_BT: torch.Tensor
    """Random numbers in [0, 1) that belong to the sequence, whatever batch and rank it comes to."""
    is_sequence_B: torch.Tensor
    """False for rows that only fill the batch up."""


def batches_for_rank(
    sequences: list[Sequence], batch_size: int, rank: int, ranks: int, pad_token_id: int, prompt_weight: float
) -> Iterator[Batch]:
    """Batches of this rank's share; every rank gets equally many, the last may be all padding.

    FSDP2's collectives need the same number of forward passes on every rank. Rows that fill up count nothing, but
    attend to one token: attention over none is no number on some devices, and no weight makes that zero.
    """
    ordered = sorted(sequences, key=lambda sequence: len(sequence.ids))
    rounds = -(-len(ordered) // (batch_size * ranks))
    for index in range(rounds):
        window = ordered[index * batch_size * ranks : (index + 1) * batch_size * ranks]
        width = max(len(sequence.ids) for sequence in window)
        ids_BT = torch.full((batch_size, width), pad_token_id)
        mask_BT = torch.zeros((batch_size, width), dtype=torch.long)
        weight_BT, writes_BT, uniform_BT = (torch.zeros(batch_size, width) for _ in range(3))
        own = window[rank::ranks]
        mask_BT[len(own) :, 0] = 1
        for row, sequence in enumerate(own):
            length, reading = len(sequence.ids), max(sequence.prompt_tokens - 1, 0)
            ids_BT[row, :length] = torch.tensor(sequence.ids)
            mask_BT[row, :length] = 1
            # The prompt's last position writes the response's first token, so it counts in full.
            weight_BT[row, :reading] = prompt_weight * sequence.weight
            weight_BT[row, reading:length] = sequence.weight
            writes_BT[row, reading : length - 1] = sequence.weight
            seed = zlib.crc32(ids_BT[row, :length].numpy().tobytes())
            uniform_BT[row, :length] = torch.rand(length, generator=torch.Generator().manual_seed(seed))
        yield Batch(ids_BT, mask_BT, weight_BT, writes_BT, uniform_BT, torch.arange(batch_size) < len(own))
