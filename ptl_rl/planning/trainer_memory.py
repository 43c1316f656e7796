"""What verl's FSDP2 engine (0.9.1) holds on one worker while it trains or reads, in bytes.

Master parameters, gradients and AdamW's two moments are float32 and shared out over all workers, 16 bytes a parameter;
blocks are put together in the computing type when they are needed. Gradients are reduced after every micro-batch, so
they are never whole for longer than a block takes.
"""

from dataclasses import dataclass

from ptl_rl.attention import FLASH
from ptl_rl.families import ModelShape

CHUNK_TOKENS = 1024
"""Of log-probabilities and divergences that are taken in float32 at a time."""
SCORE_BYTES = {"eager": 14}
"""Of every attention score where they are kept: capped, masked, as float32 probabilities and in the model's type."""

Parts = dict[str, float]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class Rows:
    """The tokens of one micro-batch; those of padded rows are all computed."""

    tokens: int
    longest: int
    """Of one of its sequences."""


@dataclass(frozen=True)
class Trainer:
    """One engine, on ``workers`` of which each holds a share."""

    shape: ModelShape
    workers: int
    compute_bytes: int
    """2 for bfloat16, 4 for float32."""
    attention: str
    checkpointing: bool = True
    reshard: bool = True
    is_cpu: bool = False

    @property
    def share(self) -> float:
        """Parameters of one worker."""
        return self.shape.parameters / self.workers

    @property
    def is_unpadded(self) -> bool:
        return self.attention == FLASH

    def state(self, *, optimizer: bool = True) -> Parts:
        """What lies on the worker between steps: master parameters and AdamW's moments."""
        return {"parameters": 4 * self.share, "optimizer": 8 * self.share if optimizer else 0.0}

    def gathered(self) -> float:
        """Parameters that are whole at one time, in the computing type.

        With several workers the next block is fetched while one computes, through a buffer as large. The output
        embedding is whole while logits are made; tied embeddings stay so throughout, as FSDP2 keeps its root together.
        """
        shape, of_each = self.shape, self.compute_bytes
        blocks = (3 if self.workers > 1 else 1) * shape.block_parameters
        if not self.reshard:
            return of_each * (shape.parameters + (shape.block_parameters if self.workers > 1 else 0))
        if shape.tied:
            return of_each * (shape.embedding_parameters + blocks)
        head = (2 if self.workers > 1 else 1) * shape.embedding_parameters
        return of_each * max(blocks, head)

    def whole_gradients(self) -> float:
        """Gradients of the largest group that is reduced at once, and its float32 copy on the way."""
        largest = max(self.shape.block_parameters, self.shape.embedding_parameters)
        return (self.compute_bytes + (4 if self.workers > 1 or self.compute_bytes == 2 else 0)) * largest

    def stream(self, tokens: int) -> float:
        """The residual stream at the start of every block: all that gradient checkpointing keeps."""
        return self.compute_bytes * self.shape.hidden_size * self.shape.num_hidden_layers * tokens

    def block_activations(self, rows: Rows) -> float:
        """What one block's forward pass keeps for its backward pass."""
        shape, of_each = self.shape, self.compute_bytes
        hidden, query = shape.hidden_size, shape.num_attention_heads * shape.head_dim
        key = shape.num_key_value_heads * shape.head_dim
        upcast = 0 if of_each == 4 else 4  # norms compute in float32
        norms = len(shape.family.norms) * hidden * (2 * of_each + upcast)
        attention = of_each * (2 * query + 2 * key)
        if not self.is_unpadded and shape.num_attention_heads != shape.num_key_value_heads:
            attention += of_each * 2 * query  # keys and values, repeated for every head
        kept = norms + attention + of_each * (2 * hidden + 4 * shape.intermediate_size)
        return kept * rows.tokens + self.scores(rows)

    def scores(self, rows: Rows) -> float:
        """Attention scores, where the kernel keeps them."""
        of_each = SCORE_BYTES.get(self.attention, 0) * (2 if self.compute_bytes == 4 else 1)
        return of_each * self.shape.num_attention_heads * rows.tokens * rows.longest

    def activations(self, rows: Rows) -> float:
        """At the height of a backward pass."""
        shape = self.shape
        block = self.block_activations(rows)
        on_its_way = self.compute_bytes * 3 * shape.intermediate_size * rows.tokens  # gradients within the FFN
        if self.checkpointing:
            return self.stream(rows.tokens) + block + on_its_way
        return shape.num_hidden_layers * block + on_its_way

    def read_activations(self, rows: Rows) -> float:
        """Of a pass without gradients: one block's."""
        shape = self.shape
        width = 4 * shape.hidden_size + 3 * shape.intermediate_size
        return self.compute_bytes * width * rows.tokens + self.scores(rows)

    def logits(self, rows: Rows, in_place: bool = True) -> float:
        """Of the loss and its backward pass.

        Args:
            in_place: flash-attn's kernel may be used; not where a parent's divergence reads the logits again.

        flash-attn's kernel writes the gradient in place of the logits. Without it padded rows are copied without their
        padding, and log-probabilities are taken of chunks of the copy, whose gradients are then put together: three
        tensors of the logits' size. A chunk's distribution and its gradient are float32, and copies of 16-bit ones. A
        cap on the logits keeps two more tensors.
        """
        values = rows.tokens * self.shape.vocab_size
        capped = 2 * self.compute_bytes if self.shape.family.model_type == "gemma2" else 0
        if self.is_unpadded and in_place:
            return (self.compute_bytes + capped) * values
        copies = 2 if self.compute_bytes == 4 else 3.5
        chunk = copies * 4 * min(rows.tokens, CHUNK_TOKENS) * self.shape.vocab_size
        return (3 * self.compute_bytes + capped) * values + chunk

    def read_logits(self, rows: Rows, *, entropy: bool = False) -> float:
        """Of a pass without gradients; ``entropy`` of padded rows is taken at once, in float32."""
        values = rows.tokens * self.shape.vocab_size
        if self.is_unpadded:
            return self.compute_bytes * values
        chunk = 2 * 4 * min(rows.tokens, CHUNK_TOKENS) * self.shape.vocab_size
        return max((self.compute_bytes + 8) * values if entropy else 0, 2 * self.compute_bytes * values + chunk)

    def update(self, rows: Rows, in_place: bool = True) -> Parts:
        """The largest of three moments of an optimizer step: loss, backward pass, AdamW; see :meth:`logits`."""
        state = {**self.state(), "gradients": 4 * self.share}
        logits, activations = self.logits(rows, in_place), self.activations(rows)
        stream = self.stream(rows.tokens) if self.checkpointing else activations
        head = self.compute_bytes * self.shape.embedding_parameters  # its gradient, while the logits' is still there
        loss = {**state, "gathered": self.gathered() + head, "activations": stream, "logits": logits}
        backward = {**state, "gathered": self.gathered() + self.whole_gradients(), "activations": activations}
        # On GPUs AdamW takes the roots of all second moments at once.
        step = {**state, "optimizer": 8 * self.share + (0 if self.is_cpu else 4 * self.share)}
        return max(loss, backward, step, key=total)

    def read(self, rows: Rows, *, optimizer: bool, entropy: bool = False, parameters: bool = True) -> Parts:
        """A pass without gradients.

        Args:
            optimizer: AdamW's moments lie on the device meanwhile.
            parameters: so do the master parameters; False for a reference policy, which reads its own from the host.
        """
        return {
            "parameters": 4 * self.share if parameters else 0.0,
            "optimizer": 8 * self.share if optimizer else 0.0,
            "gathered": self.gathered(),
            "activations": self.read_activations(rows),
            "logits": self.read_logits(rows, entropy=entropy),
        }


def total(parts: Parts) -> float:
    """All bytes of ``parts``."""
    return sum(parts.values())
