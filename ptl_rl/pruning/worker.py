"""The pruning actor: one verl worker per GPU that scores, slices and verifies its shard of the policy."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer, PreTrainedModel
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register

from ptl_rl.data.corpora import Record
from ptl_rl.families import read_shape
from ptl_rl.pruning.calibration import Collector, Listener, Sequence, batches_for_rank, encode_sequences, stream
from ptl_rl.pruning.compensation import least_squares, obs_importance
from ptl_rl.pruning.criteria import CHANNEL_CRITERIA, LAYER_CRITERIA
from ptl_rl.pruning.masking import masked
from ptl_rl.pruning.moments import SecondMoments
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.sharded import checkpoint_files, load_sharded
from ptl_rl.pruning.slicing import save_compensated, slice_weights, write_companions
from ptl_rl.stage import StageContext

COMPENSATED = ".compensated"
"""Folder, within the slice stage's, of new ``down_proj`` weights on their way to the rank that writes them."""
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

    def _stream(self, model: PreTrainedModel, records: list[Record], listeners: list[Listener]) -> list[Sequence]:
        """Read ``records`` once with the source policy; returns the sequences."""
        config, spec = self.context.config, self.context.spec
        tokenizer = AutoTokenizer.from_pretrained(spec.source, trust_remote_code=config.model.trust_remote_code)
        questions = [record.question + config.data.prompt_suffix for record in records]
        solutions = [record.solution for record in records]
        sequences = encode_sequences(tokenizer, questions, solutions, config.calibration.max_tokens)
        batch_size = config.calibration.batch_size
        rounds = -(-len(sequences) // (batch_size * self.world_size))
        batches = batches_for_rank(
            sequences,
            batch_size,
            self.rank,
            self.world_size,
            tokenizer.pad_token_id or 0,
            config.calibration.prompt_weight,
        )
        progress = (lambda done: self.context.report(done, rounds)) if self.rank == 0 else (lambda done: None)
        stream(
            model,
            self.family,
            batches,
            listeners,
            self.device,
            sensitivity=config.calibration.token_weights == "sensitivity",
            progress=progress,
        )
        return sequences

    def _down_proj(self, layer: int) -> torch.Tensor:
        """A block's (H, C) ``down_proj`` weight, read whole from the source checkpoint."""
        name = self.family.projection(layer, "down_proj") + ".weight"
        with safe_open(checkpoint_files(self.context.spec.source)[name], "pt") as file:
            return file.get_tensor(name).to(self.device)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def score(self, records: list[Record]) -> dict:
        """Stream ``records`` through the policy; rank 0 writes ``scores.safetensors``. Returns token counts."""
        config, spec = self.context.config, self.context.spec
        model = self._load(spec.source, getattr(torch, config.model.dtype))
        collector = Collector(model, self.family, model.config.intermediate_size, self.device)
        listeners: list[Listener] = [collector]
        if config.criterion.channels == "obs":
            moments = SecondMoments(model, self.family, model.config.intermediate_size, self.device)
            listeners.append(moments)
        sequences = self._stream(model, records, listeners)
        statistics = collector.reduce()
        if config.criterion.channels == "obs":
            importance_LC = self._obs_importance(moments, statistics.abs_sum_LC.shape)
        else:
            importance_LC = CHANNEL_CRITERIA[config.criterion.channels](statistics)
        if self.rank == 0:
            influence_L = LAYER_CRITERIA[config.criterion.layers](statistics)
            scores = {"importance_LC": importance_LC.cpu(), "block_influence_L": influence_L}
            save_file(scores, spec.out / "scores.safetensors")
        return {
            "calibration_tokens": sum(len(sequence.ids) for sequence in sequences),
            "calibration_sequences": len(sequences),
        }

    def _obs_importance(self, moments: SecondMoments, shape: torch.Size) -> torch.Tensor:
        """(L, C): the place in the order of removal for this cycle's channels, above it for those that stay."""
        importance_LC = torch.zeros(shape, device=self.device)
        for layer, moment_CC in moments.own_CC.items():
            importance_LC[layer] = obs_importance(
                self._down_proj(layer),
                moment_CC,
                self.context.spec.remove_channels,
                self.context.config.criterion.ridge,
            )
        dist.all_reduce(importance_LC)
        return importance_LC

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def compensate(self, plan: PruningPlan, records: list[Record]) -> dict[int, tuple[float, float]]:
        """Solve for what the kept channels take over; every rank writes its own blocks' weights for :meth:`slice`.

        Returns, for this rank's blocks, the share of the FFN output that slicing loses without and with it.
        """
        model = self._load(self.context.spec.source, getattr(torch, self.context.config.model.dtype))
        moments = SecondMoments(model, self.family, model.config.intermediate_size, self.device)
        self._stream(model, records, [moments])
        del model  # the solves need the memory
        errors = {}
        for layer, moment_CC in moments.own_CC.items():
            if layer in plan.keep_layers:
                fit = least_squares(self._down_proj(layer), moment_CC, plan.keep_channels[layer], plan.ridge)
                save_compensated(self.context.spec.out / COMPENSATED, layer, fit.weight_HK)
                errors[layer] = (fit.error_plain, fit.error)
        dist.barrier()
        return errors

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def slice(self, plan: PruningPlan) -> None:
        """Write this rank's files of the sliced checkpoint; rank 0 adds the configuration and tokenizer."""
        spec = self.context.spec
        compensated = spec.out / COMPENSATED if plan.compensate == "least_squares" else None
        report = self.context.report if self.rank == 0 else lambda done, total: None
        weight_map = slice_weights(
            spec.source,
            plan,
            spec.out,
            rank=self.rank,
            ranks=self.world_size,
            compensated=compensated,
            progress=report,
        )
        dist.barrier()
        if self.rank == 0:
            write_companions(spec.source, plan, spec.out, weight_map)
            if compensated is not None:
                shutil.rmtree(compensated)
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
            compensated = self._written_down_proj(plan) if plan.compensate == "least_squares" else None
            with masked(source, self.family, plan, compensated):
                expected_BTV = source(input_ids=ids_BT, use_cache=False).logits
            del source
            actual_BTV = self._load(spec.out, torch.float32)(input_ids=ids_BT, use_cache=False).logits
        scale = expected_BTV.abs().max().clamp_min(1e-6)
        return float((actual_BTV - expected_BTV).abs().max() / scale)

    def _written_down_proj(self, plan: PruningPlan) -> Callable[[int], torch.Tensor]:
        """Source block to its ``down_proj`` weight as the sliced checkpoint has it."""
        files = checkpoint_files(self.context.spec.out)
        new_index = {old: new for new, old in enumerate(plan.keep_layers)}

        def read(layer: int) -> torch.Tensor:
            name = self.family.projection(new_index[layer], "down_proj") + ".weight"
            with safe_open(files[name], "pt") as file:
                return file.get_tensor(name)

        return read

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
