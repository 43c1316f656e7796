"""The pruning actor: one verl worker per GPU that scores, slices and verifies its shard of the model."""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register

from ptl_rl.attention import FLASH, without_flash
from ptl_rl.checkpoints.sharded import load_sharded
from ptl_rl.checkpoints.write import write_tensors
from ptl_rl.data.encoding import Sequence, encode_sequences
from ptl_rl.families import read_config_json, read_shape
from ptl_rl.pruning import engine
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.texts import Texts
from ptl_rl.pruning.slice.slicing import slice_weights, write_companions
from ptl_rl.pruning.slice.verify import logit_difference
from ptl_rl.stage import StageContext

NEW_WEIGHTS = ".new_weights"
"""Folder, within the slice stage's, of compensated weights on their way to the rank that writes them."""


def claim_gpu() -> None:
    """Stay on the GPU that is this rank's: verl has chosen it where Ray leaves all of a node's visible, else it is 0.

    Asked for here, as the process group and the device mesh would otherwise choose one by the rank's number.
    """
    torch.cuda.set_device(torch.cuda.current_device())


class PruningWorker(Worker):
    """Runs on every rank; all methods are collective."""

    def __init__(self, context: StageContext) -> None:
        super().__init__()
        self.context = context
        torch.manual_seed(context.seed)
        cpu = context.spec.device == "cpu"
        if not cpu:
            claim_gpu()
        dist.init_process_group("gloo" if cpu else "nccl", rank=self.rank, world_size=self.world_size)
        self.mesh = init_device_mesh(context.spec.device, (self.world_size,))
        self.device = torch.device(context.spec.device)
        self.family = read_shape(context.spec.source).family
        self.tokenizer = AutoTokenizer.from_pretrained(
            context.spec.source, trust_remote_code=context.config.model.trust_remote_code
        )

    def _load(self, folder: Path, dtype: torch.dtype):
        attention, trust = self.context.spec.attention, self.context.config.model.trust_remote_code
        if dtype == torch.float32 and attention == FLASH:  # it takes 16 bits only
            attention = without_flash(read_config_json(folder))
        return load_sharded(folder, self.mesh, dtype, attention=attention, trust_remote_code=trust)

    def _prunable(self) -> engine.PrunableModel:
        config, source = self.context.config, self.context.spec.source
        return engine.PrunableModel(
            model=self._load(source, getattr(torch, config.model.dtype)),
            family=self.family,
            source=source,
            device=self.device,
            batch_size=config.calibration.batch_size,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            prompt_weight=config.calibration.prompt_weight,
            moments_gib=config.calibration.moments_gib,
        )

    def _sequences(self, texts: Texts) -> list[Sequence]:
        config = self.context.config
        return encode_sequences(
            self.tokenizer, texts.questions, texts.solutions, config.calibration.max_tokens, texts.weights
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def score(self, texts: Texts, general: Texts) -> dict:
        """Read the texts with the model; rank 0 writes ``scores.safetensors``. Returns token counts."""
        config, spec = self.context.config, self.context.spec
        prunable, sequences, general_sequences = self._prunable(), self._sequences(texts), self._sequences(general)
        cut = engine.Removal(spec.remove_channels, spec.remove_layers, spec.removed_layers)
        total = engine.batches_to_read(prunable, config.criterion, cut, sequences, general_sequences)
        prunable.report(self._report, total)
        scores = engine.score(
            prunable,
            config.criterion,
            cut,
            sequences,
            general=general_sequences,
            sensitivity=config.calibration.token_weights == "sensitivity",
            seed=self.context.seed,
        )
        if self.rank == 0:
            write_tensors(scores.tensors(), spec.out / "scores.safetensors")
        return {
            "calibration_tokens": sum(len(sequence.ids) for sequence in sequences),
            "calibration_sequences": len(sequences),
        }

    def _report(self, done: int, total: int) -> None:
        """Tell the driver how far it is; rank 0 does."""
        if self.rank == 0:
            self.context.report(done, total)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def compensate(self, plan: PruningPlan, texts: Texts) -> engine.Losses:
        """Solve for what the kept channels and blocks take over; :meth:`slice` picks the new weights up."""
        prunable, sequences = self._prunable(), self._sequences(texts)
        sensitivity = self.context.config.calibration.token_weights == "sensitivity"
        total = engine.batches_to_compensate(prunable, len(plan.layer_order), sequences, sensitivity=sensitivity)
        prunable.report(self._report, total)
        folder = self.context.spec.out / NEW_WEIGHTS
        return engine.compensate(prunable, plan, sequences, folder, sensitivity=sensitivity)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def slice(self, plan: PruningPlan, source: Path | None = None, out: Path | None = None) -> None:
        """Write this rank's files of the sliced checkpoint; rank 0 adds the configuration and tokenizer.

        Args:
            source: checkpoint to slice, and ``out`` the folder to write to; default: those of the stage.
        """
        spec = self.context.spec
        source, out = source or spec.source, out or spec.out
        new_weights = out / NEW_WEIGHTS if plan.compensate == "least_squares" else None
        weight_map = slice_weights(
            source,
            plan,
            out,
            rank=self.rank,
            ranks=self.world_size,
            new_weights=new_weights,
            progress=self._report,
        )
        dist.barrier()
        if self.rank == 0:
            write_companions(source, plan, out, weight_map)
        dist.barrier()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def verify(self, plan: PruningPlan, texts: list[str]) -> float:
        """The export contract: logits of the written checkpoint against those of the masked source, both in float32.

        Returns the largest difference relative to the largest logit.
        """
        spec = self.context.spec
        new_weights = spec.out / NEW_WEIGHTS if plan.compensate == "least_squares" else None
        difference = logit_difference(
            lambda folder: self._load(folder, torch.float32),
            self.family,
            spec.source,
            plan,
            spec.out,
            self.tokenizer,
            texts,
            new_weights,
        )
        dist.barrier()
        if self.rank == 0 and new_weights is not None:
            shutil.rmtree(new_weights)
        return difference

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def peak_memory_gib(self) -> float:
        """Largest resident (CPU) or allocated (GPU) memory of this rank, in GiB."""
        if self.context.spec.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
