"""What continued pre-training reads: documents as token ids, in one memory-mapped Arrow file per recovery.

A document is a sequence of its own and is never joined with another: a micro-batch holds as many whole sequences as fit
into ``micro_batch_tokens``, and verl tells flash attention where each begins (without flash attention they are rows of
a padded batch). So no document sees another. A worked solution longer than ``max_tokens`` is cut, as its end alone
makes no sense; a longer text becomes several sequences.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import torch
from torch.utils.data import Dataset

from ptl_rl.data.corpora import Record
from ptl_rl.data.encoding import encode_sequences

SCHEMA = pyarrow.schema([("ids", pyarrow.list_(pyarrow.int32())), ("loss_from", pyarrow.int32())])
ROWS_AT_ONCE = 1024


@dataclass
class Counts:
    """What :func:`write_sequences` wrote."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    cut: int = 0
    """Worked solutions that were longer than ``max_tokens``."""


def document_ids(tokenizer, record: Record, suffix: str) -> tuple[list[int], int]:
    """A record as the policy sees it in RL, question in the chat template and solution, or plain text.

    Returns:
        All ids, the end-of-sequence token last, and how many belong to the question.
    """
    question = record.question + suffix if record.question else ""
    (sequence,) = encode_sequences(tokenizer, [question], [record.solution], 1 << 30)
    ids = sequence.ids
    if not question and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return ids, sequence.prompt_tokens


def _pieces(ids: list[int], prompt: int, max_tokens: int) -> Iterator[tuple[list[int], int]]:
    if prompt:
        yield ids[:max_tokens], prompt
        return
    for start in range(0, len(ids), max_tokens):
        yield ids[start : start + max_tokens], 0


def write_sequences(
    records: Iterable[Record], tokenizer, path: Path, *, suffix: str, max_tokens: int, response_only: bool
) -> Counts:
    """Encode ``records`` into ``path``; sequences in which no token would count are left out.

    Args:
        response_only: only the solution's tokens count in the loss, otherwise all but each sequence's first.
    """
    counts, rows = Counts(), []
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, SCHEMA) as writer:
        for record in records:
            ids, prompt = document_ids(tokenizer, record, suffix)
            counts.documents += 1
            counts.cut += bool(prompt) and len(ids) > max_tokens
            for piece, prompt_tokens in _pieces(ids, prompt, max_tokens):
                first = max(1, prompt_tokens if response_only else 1)  # nothing comes before the first token
                if len(piece) <= first:
                    continue
                rows.append({"ids": piece, "loss_from": first})
                counts.sequences += 1
                counts.tokens += len(piece)
                if len(rows) == ROWS_AT_ONCE:
                    writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, SCHEMA))
                    rows = []
        if rows:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, SCHEMA))
    return counts


class SequenceFile(Dataset):
    """Reads :func:`write_sequences`' file for verl's SFT trainer, which makes it by this signature."""

    def __init__(self, parquet_files: str, tokenizer=None, config=None, processor=None, max_samples: int = -1) -> None:
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(parquet_files))).read_all()
        self.ids, self.loss_from = table.column("ids"), table.column("loss_from")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``input_ids``, ``position_ids`` and ``loss_mask``, each (T,)."""
        ids_T = torch.from_numpy(self.ids[index].values.to_numpy().astype("int64"))
        loss_mask_T = torch.zeros_like(ids_T)
        loss_mask_T[self.loss_from[index].as_py() :] = 1
        return {"input_ids": ids_T, "position_ids": torch.arange(len(ids_T)), "loss_mask": loss_mask_T}
