"""What a rank of the pruning worker holds while it scores, compensates and checks, in bytes.

``ptl_rl/checkpoints/sharded.py`` shares the policy out in the computing type and keeps its root (embeddings) whole;
matrices of second moments are float32, solves are float64.
"""

from dataclasses import dataclass

from ptl_rl.attention import FLASH
from ptl_rl.config import RunConfig
from ptl_rl.families import ModelShape
from ptl_rl.planning.hardware import GIB
from ptl_rl.planning.schedule import Cut
from ptl_rl.planning.trainer_memory import Parts, Rows, Trainer, total

ORDER_BYTES = 32
"""Of a block's order of removal, per element of its matrix: the inverse, its factor and what is being updated."""
SOLVE_BYTES = 20
"""Of the new weights of a block likewise: the kept part, its float64 copy with a ridge, and the factor."""
ABSORPTION_GIB = 4.0
"""Most memory of regressions of blocks in one pass, where ``calibration.moments_gib`` does not say."""
CHECKED_TOKENS = 4 * 128
"""Texts times tokens that the export check reads."""


@dataclass(frozen=True)
class Pruner:
    """One rank of ``workers``."""

    config: RunConfig
    workers: int
    compute_bytes: int
    attention: str
    is_cpu: bool = False

    @property
    def rows(self) -> Rows:
        """Of one batch; they are padded whatever the attention."""
        calibration = self.config.calibration
        return Rows(calibration.batch_size * calibration.max_tokens, calibration.max_tokens)

    def _reader(self, shape: ModelShape, compute_bytes: int | None = None) -> Trainer:
        attention = "sdpa" if self.attention == FLASH else self.attention
        return Trainer(shape, self.workers, compute_bytes or self.compute_bytes, attention, checkpointing=False)

    def _policy(self, shape: ModelShape, compute_bytes: int | None = None) -> Parts:
        """The share, and the root and the blocks that are whole."""
        of_each = compute_bytes or self.compute_bytes
        root = shape.embedding_parameters * (1 if shape.tied else 2)
        blocks = (3 if self.workers > 1 else 1) * shape.block_parameters
        return {"parameters": of_each * shape.parameters / self.workers, "gathered": of_each * (root + blocks)}

    def _gradient_pass(self, shape: ModelShape) -> Parts:
        """Activations of all blocks, and logits with their distribution, where positions are weighed by gradients."""
        reader, values = self._reader(shape), self.rows.tokens * shape.vocab_size
        logits = (self.compute_bytes + 3 * 4) * values
        return {"activations": reader.activations(self.rows), "logits": logits}

    def _read(self, shape: ModelShape) -> Parts:
        """One block's activations and what the hooks make of them, in float32."""
        widest = max(shape.intermediate_size, 2 * shape.hidden_size)
        copies = 4 * widest * self.rows.tokens * (2 if self.config.criterion.is_obs else 1)
        return {"activations": self._reader(shape).read_activations(self.rows) + copies}

    def matrices(self, shape: ModelShape) -> int:
        """Second moments of blocks that a rank holds at once."""
        limit = self.config.calibration.moments_gib
        own = -(-shape.num_hidden_layers // self.workers)
        if limit is None:
            return own
        return max(1, min(own, int(limit * GIB / (4 * shape.intermediate_size**2))))

    def score(self, shape: ModelShape, cut: Cut) -> Parts:
        """Reading, and the order of removal of one block."""
        config, square = self.config, shape.intermediate_size**2
        reads = self._read(shape)
        if config.calibration.token_weights == "sensitivity" or config.criterion.channels == "taylor":
            reads = self._gradient_pass(shape)
        sums = 6 * 8.0 * shape.num_hidden_layers * shape.intermediate_size
        of_blocks = self._of_blocks(shape) if cut.layers and config.criterion.layers == "leave_one_out" else 0.0
        policy = self._policy(shape)
        if not (config.criterion.is_obs and cut.channels):
            return {**policy, **reads, "sums": sums + of_blocks}
        held = 4.0 * square * self.matrices(shape)
        reading = {**policy, **reads, "sums": sums + held + (4.0 * square if self.workers > 1 else 0)}
        solving = {**policy, "sums": sums + held + ORDER_BYTES * square}
        trying = {**policy, **reads, "sums": sums + of_blocks}
        return max(reading, solving, trying, key=total)

    def _of_blocks(self, shape: ModelShape) -> float:
        """Regressions of what blocks add, where each is tried out and others take over; logits of the tried."""
        logits = (self.compute_bytes + 8 * self.rows.longest / self.rows.tokens) * self.rows.tokens * shape.vocab_size
        if self.config.criterion.compensate == "none":
            return logits
        own = -(-shape.num_hidden_layers // self.workers)
        at_once = min(own, self.regressions(shape, self.config.calibration.moments_gib))
        inputs = self._inputs(shape)
        each = 4.0 * inputs * (inputs + shape.hidden_size)
        reading = each if self.workers > 1 else 0.0  # a batch's products on their way to the rank that owns them
        return at_once * each + max(reading, 2 * 8.0 * inputs**2, logits)

    @staticmethod
    def _inputs(shape: ModelShape) -> int:
        """Of the regression of a block's contribution on what the block before it could take over with."""
        attention = shape.num_attention_heads * shape.head_dim if shape.family.output_norm is None else 0
        return shape.intermediate_size + attention

    @classmethod
    def regressions(cls, shape: ModelShape, moments_gib: float | None) -> int:
        """How many of them a rank holds in one pass, as ``absorption.groups`` has it."""
        inputs = cls._inputs(shape)
        each_gib = inputs * (inputs + shape.hidden_size) * 4 / GIB
        return max(1, int((moments_gib or ABSORPTION_GIB) / each_gib))

    def compensate(self, shape: ModelShape, cut: Cut) -> Parts:
        """Two residual streams, one block's sums, and its solve."""
        calibration, hidden = self.config.calibration, shape.hidden_size
        tokens = calibration.sequences * calibration.max_tokens / self.workers
        streams = 2.0 * self.compute_bytes * hidden * tokens
        if calibration.token_weights == "sensitivity":
            streams += 4.0 * shape.num_hidden_layers * tokens
        width = max(shape.intermediate_size, shape.num_attention_heads * shape.head_dim)
        sums = 4.0 * width * (width + hidden)
        seen = shape.intermediate_size + 6 * hidden + shape.num_attention_heads * shape.head_dim
        twice = (2 * self.compute_bytes * seen + 4 * (shape.intermediate_size + hidden)) * self.rows.tokens
        policy = {**self._policy(shape), "streams": streams}
        reading = {**policy, "activations": twice, "sums": sums}
        solving = {**policy, "sums": sums + SOLVE_BYTES * float(width) ** 2 + 8 * 3.0 * width * hidden}
        found = [reading, solving]
        if calibration.token_weights == "sensitivity":
            found.append({**self._policy(shape), **self._gradient_pass(shape)})
        return max(found, key=total)

    def check(self, shape: ModelShape) -> Parts:
        """The export check: the masked original in float32, then the written one."""
        logits = 3 * 4.0 * CHECKED_TOKENS * shape.vocab_size
        return {**self._policy(shape, compute_bytes=4), "logits": logits}
