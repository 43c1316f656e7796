"""The pruning actor: one verl worker per GPU that scores, slices and verifies its shard of the policy."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register

from ptl_rl.data.corpora import Record
from ptl_rl.families import FAMILIES, read_shape
from ptl_rl.pruning.calibration import Collector, batches_for_rank, encode_sequences
from ptl_rl.pruning.criteria import CHANNEL_CRITERIA, LAYER_CRITERIA
from ptl_rl.pruning.masking import masked
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.sharded import load_sharded
from ptl_rl.pruning.slicing import slice_weights, write_companions
from ptl_rl.stage import StageContext

EXPORT_TOLERANCE = 1e-3
"""Largest accepted difference of float32 logits, relative to the largest logit; see :meth:`PruningWorker.verify`."""


class PruningWorker(Worker):
    """Runs on every rank; all methods are collective."""

    def __init__(self, context: StageContext) -> None:
        super().__init__()
        self.context = context
        torch.manual_seed(context.seed)
        cpu = context.spec.device == "cpu"
        if not cpu:
            torch.cuda.set_device(0)
        dist.init_process_group("gloo" if cpu else "nccl", rank=self.rank, world_size=self.world_size)
        self.mesh = init_device_mesh(context.spec.device, (self.world_size,))
        self.device = torch.device(context.spec.device)
        self.family = read_shape(context.spec.source).family

    def _load(self, folder: Path, dtype: torch.dtype):
        model = self.context.config.model
        return load_sharded(
            folder, self.mesh, dtype, attention=model.attention, trust_remote_code=model.trust_remote_code
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def score(self, records: list[Record]) -> dict:
        """Stream ``records`` through the policy; rank 0 writes ``scores.safetensors``. Returns token counts."""
        config, spec = self.context.config, self.context.spec
        tokenizer = AutoTokenizer.from_pretrained(spec.source, trust_remote_code=config.model.trust_remote_code)
        questions = [record.question + config.data.prompt_suffix for record in records]
        solutions = [record.solution for record in records]
        sequences = encode_sequences(tokenizer, questions, solutions, config.calibration.max_tokens)
        model = self._load(spec.source, getattr(torch, config.model.dtype))
        collector = Collector(model, FAMILIES[self.family.model_type], model.config.intermediate_size, self.device)
        batch_size = config.calibration.batch_size
        rounds = -(-len(sequences) // (batch_size * self.world_size))
        batches = batches_for_rank(sequences, batch_size, self.rank, self.world_size, tokenizer.pad_token_id or 0)
        with torch.no_grad(), collector.attached():
            for index, (ids_BT, mask_BT) in enumerate(batches, 1):
                mask_BT = mask_BT.to(self.device)
                collector.start_batch(mask_BT)
                ids_BT = ids_BT.to(self.device)
                # The root module gathers the embeddings, so it must be called; its logits are not needed.
                model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=1)
                if self.rank == 0:
                    self.context.report(index, rounds)
        statistics = collector.reduce()
        if self.rank == 0:
            scores = {
                "importance_LC": CHANNEL_CRITERIA[config.criterion.channels](statistics),
                "block_influence_L": LAYER_CRITERIA[config.criterion.layers](statistics),
            }
            save_file(scores, spec.out / "scores.safetensors")
        return {"calibration_tokens": int(statistics.tokens), "calibration_sequences": len(sequences)}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def slice(self, plan: PruningPlan) -> None:
        """Write this rank's files of the sliced checkpoint; rank 0 adds the configuration and tokenizer."""
        spec = self.context.spec
        report = self.context.report if self.rank == 0 else lambda done, total: None
        weight_map = slice_weights(spec.source, plan, spec.out, rank=self.rank, ranks=self.world_size, progress=report)
        dist.barrier()
        if self.rank == 0:
            write_companions(spec.source, plan, spec.out, weight_map)
        dist.barrier()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def verify(self, plan: PruningPlan, texts: list[str]) -> float:
        """The export contract: logits of the written checkpoint against those of the masked source, both in float32.

        Returns the largest difference relative to the largest logit.
        """
        spec = self.context.spec
        tokenizer = AutoTokenizer.from_pretrained(spec.source)
        encoded = [tokenizer.encode(text)[:128] for text in texts]
        width = min(map(len, encoded))
        ids_BT = torch.tensor([ids[:width] for ids in encoded], device=self.device)
        with torch.no_grad():
            source = self._load(spec.source, torch.float32)
            with masked(source, FAMILIES[self.family.model_type], plan):
                expected_BTV = source(input_ids=ids_BT, use_cache=False).logits
            del source
            actual_BTV = self._load(spec.out, torch.float32)(input_ids=ids_BT, use_cache=False).logits
        scale = expected_BTV.abs().max().clamp_min(1e-6)
        return float((actual_BTV - expected_BTV).abs().max() / scale)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def peak_memory_gib(self) -> float:
        """Largest resident (CPU) or allocated (GPU) memory of this rank, in GiB."""
        if self.context.spec.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def process_id(self) -> int:
        return os.getpid()
