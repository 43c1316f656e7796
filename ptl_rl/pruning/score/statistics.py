"""Sums over calibration tokens, from which criteria are computed: vectors per block, whatever the corpus."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm

from ptl_rl.families import Family
from ptl_rl.pruning.score.streaming import NOTHING_COUNTS, CalibrationError, Listener

CPU_ROWS = 256
"""Rows that a CPU adds up at a time, so that the temporaries stay in its cache."""


CHANNEL_SUMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda hidden_NC: hidden_NC,
    "abs_sum": torch.abs,
    "square_sum": torch.square,
}
"""What is summed up for ``Statistics.sum_LC`` and the others."""


@dataclass(frozen=True)
class Needs:
    """What a criterion reads; each costs something."""

    sums: tuple[str, ...] = tuple(CHANNEL_SUMS)
    """Which of ``sum``, ``abs_sum``, ``square_sum``; the others are NaN."""
    cosine: bool = True
    """``cosine_sum_L``; NaN without."""
    gradients: bool = False
    """``gradient_sum_LC``; a backward pass."""
    last_tokens: bool = False
    """``last_lowest_LC`` and ``last_highest_LC``; a sort per sequence and block."""


@dataclass
class Statistics:
    """Weighted sums over all calibration tokens of all ranks, on the CPU. L blocks, C channels per block."""

    sum_LC: torch.Tensor
    """Of ``h_j``, the input of ``down_proj``; float64, as all sums."""
    abs_sum_LC: torch.Tensor
    """Of ``|h_j|``."""
    square_sum_LC: torch.Tensor
    """Of ``h_j^2``."""
    channel_weight_L: torch.Tensor
    """Of the weights in the three above."""
    change_sum_L: torch.Tensor
    """Of the norm of (block output - block input)."""
    cosine_sum_L: torch.Tensor
    """Of the cosine between block output and block input."""
    block_weight_L: torch.Tensor
    """Of the weights in the two above."""
    gate_norm_LC: torch.Tensor
    """Euclidean norm of every row of ``gate_proj``."""
    up_norm_LC: torch.Tensor
    """Euclidean norm of every row of ``up_proj``."""
    down_norm_LC: torch.Tensor
    """Euclidean norm of every column of ``down_proj``."""
    down_abs_LC: torch.Tensor
    """Sum of the absolute values of every column of ``down_proj``."""
    gradient_sum_LC: torch.Tensor | None = None
    """Of ``|h_j * dL/dh_j|``, L the negative log-likelihood of the sequences; where the criterion needs gradients."""
    last_lowest_LC: torch.Tensor | None = None
    """Largest place, over sequences, of the last token's ``h_j`` among its block's in ascending order; int64."""
    last_highest_LC: torch.Tensor | None = None
    """The same in descending order."""
    general: "Statistics | None" = None
    """The same of general text, where ``criterion.contrast`` names some."""
    remove_channels: int = 0
    """How many channels every block is to lose now."""
    seed: int = 0
    """Of the run and cycle."""

    def at(self, channels_LK: torch.Tensor) -> "Statistics":
        """The same of some channels only, by their ids in each block."""

        def of(name: str, value: Any) -> Any:
            if name == "general":
                return value and value.at(channels_LK)
            return value.gather(1, channels_LK) if name.endswith("_LC") and value is not None else value

        return Statistics(**{name: of(name, value) for name, value in vars(self).items()})


def _norms(weight: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean norms and sums of absolute values along ``dim``, whole on every rank; collective if sharded."""
    weight = weight.detach().float()
    square, absolute = (part.sum(dim, dtype=torch.float64) for part in (weight.square(), weight.abs()))
    if isinstance(square, DTensor) and isinstance(absolute, DTensor):
        square, absolute = square.full_tensor(), absolute.full_tensor()
    return square.sqrt(), absolute


def _rows(*tensors_N: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of all, as many at a time as suit the device."""
    rows = CPU_ROWS if tensors_N[0].device.type == "cpu" else len(tensors_N[0])
    return zip(*(tensor_N.split(rows) for tensor_N in tensors_N), strict=True)


@dataclass
class Collector(Listener):
    """Adds up the sums that :class:`Statistics` consist of."""

    model: nn.Module
    family: Family
    channels: int
    device: torch.device
    needs: Needs = Needs()
    wants_blocks: bool = True
    blocks: list[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = list(self.model.get_submodule(self.family.layers).children())
        self.wants_gradients, self.wants_last = self.needs.gradients, self.needs.last_tokens
        layers = len(self.blocks)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.gradient_sum_LC = zeros(layers, self.channels)
        self.sums_LC = {name: zeros(layers, self.channels) for name in CHANNEL_SUMS}
        for name in CHANNEL_SUMS.keys() - self.needs.sums:
            self.sums_LC[name].fill_(torch.nan)
        self.channel_weight_L, self.change_sum_L, self.cosine_sum_L, self.block_weight_L = (
            zeros(layers) for _ in range(4)
        )
        if not self.needs.cosine:
            self.cosine_sum_L.fill_(torch.nan)
        self.last_lowest_LC, self.last_highest_LC = (zeros(layers, self.channels, dtype=torch.int64) for _ in range(2))

    def on_channels(self, layer: int, hidden_NC: torch.Tensor, weight_N: torch.Tensor) -> None:
        of_batch = {name: torch.zeros(self.channels, device=self.device) for name in self.needs.sums}
        for hidden_RC, weight_R in _rows(hidden_NC, weight_N) if of_batch else ():
            hidden_RC = hidden_RC.float()
            for name, sum_C in of_batch.items():
                sum_C.addmv_(CHANNEL_SUMS[name](hidden_RC).t(), weight_R)
        for name, sum_C in of_batch.items():
            self.sums_LC[name][layer] += sum_C
        self.channel_weight_L[layer] += weight_N.sum()

    def on_gradient(self, layer: int, hidden_NC: torch.Tensor, gradient_NC: torch.Tensor) -> None:
        self.gradient_sum_LC[layer] += (hidden_NC.float() * gradient_NC.float()).abs().sum(0)

    def on_last(self, layer: int, hidden_BC: torch.Tensor) -> None:
        if len(hidden_BC):
            place_BC = hidden_BC.float().argsort(dim=1, stable=True).argsort(dim=1)
            self.last_lowest_LC[layer] = torch.maximum(self.last_lowest_LC[layer], place_BC.amax(0))
            highest_C = self.channels - 1 - place_BC.amin(0)
            self.last_highest_LC[layer] = torch.maximum(self.last_highest_LC[layer], highest_C)

    def on_block(self, layer: int, inputs_NH: torch.Tensor, outputs_NH: torch.Tensor, weight_N: torch.Tensor) -> None:
        norms: list[torch.Tensor] = []
        for before_RH, after_RH in _rows(inputs_NH, outputs_NH):
            before_RH, after_RH = before_RH.float(), after_RH.float()
            read = (after_RH - before_RH, before_RH, after_RH) if self.needs.cosine else (after_RH - before_RH,)
            norms.append(torch.stack([vector_norm(tensor_RH, dim=-1) for tensor_RH in read]))
        change_N, *ends = torch.cat(norms, dim=1).double()
        weight_N = weight_N.double()
        self.change_sum_L[layer] += change_N @ weight_N
        if self.needs.cosine:
            # By the law of cosines: three norms are cheaper than two norms and a product. Padding may be all zero.
            before_N, after_N = ends
            product_N = (before_N.square() + after_N.square() - change_N.square()) / 2
            self.cosine_sum_L[layer] += (product_N / (before_N * after_N).clamp_min(1e-12)) @ weight_N
        self.block_weight_L[layer] += weight_N.sum()

    def _weight_norms(self) -> dict[str, torch.Tensor]:
        rows: dict[str, list[torch.Tensor]] = {}
        for block in self.blocks:
            mlp = block.get_submodule(self.family.mlp)
            for name, dim in (("gate", 1), ("up", 1), ("down", 0)):
                module = getattr(self.family, f"{name}_proj")
                norm_C, absolute_C = _norms(mlp.get_parameter(f"{module}.weight"), dim)
                rows.setdefault(f"{name}_norm_LC", []).append(norm_C)
                rows.setdefault(f"{name}_abs_LC", []).append(absolute_C)
        kept = ("gate_norm_LC", "up_norm_LC", "down_norm_LC", "down_abs_LC")
        return {name: torch.stack(rows[name]).cpu() for name in kept}

    def reduce(self, *, remove_channels: int = 0, seed: int = 0) -> Statistics:
        """Add up over all ranks.

        Raises:
            CalibrationError: no position of any sequence has any weight.
        """
        sums = ["channel_weight_L", "change_sum_L", "cosine_sum_L", "block_weight_L", "gradient_sum_LC"]
        places = ["last_lowest_LC", "last_highest_LC"]
        totals = {f"{name}_LC": sum_LC.clone() for name, sum_LC in self.sums_LC.items()}
        totals |= {name: getattr(self, name).clone() for name in sums + places}
        if dist.is_initialized():
            for name, total in totals.items():
                dist.all_reduce(total, dist.ReduceOp.MAX if name in places else dist.ReduceOp.SUM)
        if not (totals["channel_weight_L"].min() > 0 and totals["block_weight_L"].min() > 0):
            raise CalibrationError(NOTHING_COUNTS)
        unused = [] if self.needs.gradients else ["gradient_sum_LC"]
        unused += [] if self.needs.last_tokens else places
        found: dict[str, Any] = {name: total.cpu() for name, total in totals.items() if name not in unused}
        found |= self._weight_norms()
        return Statistics(**found, remove_channels=remove_channels, seed=seed)
