"""What the solves of one block's compensation cost, shared out over ranks and, as they once were, on one rank alone.

``python benchmarks/solves.py --ranks 2``: both ways in turns, from every rank's own sums to the new weight on all of
them; one thread a rank, gloo. ``--ranks 1`` says what the algebra alone saves. Where other work disturbs the clock, the
processor time of the busiest rank says how long the ways would take by themselves, but for what ranks send each other.
"""

import os
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer

from ptl_rl.families import FAMILIES
from ptl_rl.pruning.compensate.block_moments import ridge_regression
from ptl_rl.pruning.compensate.refit import _Refit
from ptl_rl.pruning.compensate.regression import Sums
from ptl_rl.pruning.model import PrunableModel

RIDGE, STREAM_RIDGE = 1e-3, 1e-2


def alone(sums: Sums, weight_HC: torch.Tensor, keep: list[int]) -> torch.Tensor:
    """Rank 0 solves all and tells the others; errors by products over all channels."""
    for total in (sums.xx_XX, sums.xy_XH):
        dist.reduce(total, 0)
    new_HK = torch.empty(len(weight_HC), len(keep))
    if dist.get_rank() == 0:
        weight_HC, exact_CC, kept_K = weight_HC.double(), sums.xx_XX.double(), torch.tensor(keep)
        change_HC = weight_HC.clone()
        change_HC[:, kept_K] = 0
        ridged_CC = exact_CC.clone()
        ridged_CC.diagonal().add_(RIDGE * ridged_CC.diagonal().mean())
        factor_KK = torch.linalg.cholesky(ridged_CC[kept_K][:, kept_K])
        gain_HK = torch.cholesky_solve(exact_CC[kept_K] @ change_HC.T, factor_KK).T
        for matrix_HC in (weight_HC, change_HC):
            ((matrix_HC @ exact_CC) * matrix_HC).sum()
        change_HC[:, kept_K] = -gain_HK
        ((change_HC @ exact_CC) * change_HC).sum()
        xx_KK, xy_KH = sums.xx_XX[kept_K][:, kept_K], sums.xy_XH[kept_K]
        new_HK = (weight_HC[:, kept_K] + gain_HK).float()
        new_HK += ridge_regression(xx_KK, xy_KH, [slice(None)], STREAM_RIDGE).T.float()
    dist.broadcast(new_HK, 0)
    return new_HK


def shared(sums: Sums, weight_HC: torch.Tensor, keep: list[int]) -> torch.Tensor:
    """As the package does it."""
    prunable = PrunableModel(None, FAMILIES["llama"], Path(), torch.device("cpu"), 1, 0, 1.0)
    prunable.weight = lambda layer, name, rows=slice(None): weight_HC[rows]
    run = SimpleNamespace(prunable=prunable, plan=SimpleNamespace(ridge=RIDGE, stream_ridge=STREAM_RIDGE))
    run.shares = torch.zeros(2, dtype=torch.float64)
    run._before_norm = lambda _layer, _name, change_RK, _rows: change_RK
    sums.reduce()
    return _Refit._solved(run, 0, "down_proj", sums, keep)


def _copy(sums: Sums) -> Sums:
    copied = Sums(1, 1, torch.device("cpu"))
    copied.xx_XX, copied.xy_XH, copied.square = sums.xx_XX.clone(), sums.xy_XH.clone(), sums.square.clone()
    return copied


def _work(rank: int, ranks: int, port: int, channels: int, hidden: int, remove: int, repeats: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(rank)
    mixing_CC = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99)) / channels**0.5
    x_BTC = (torch.randn(1, 2 * channels, channels, generator=generator) @ mixing_CC).relu()
    weight_HC = torch.randn(hidden, channels, generator=torch.Generator().manual_seed(7))
    sums = Sums(channels, hidden, torch.device("cpu"))
    counts_BT = torch.ones(1, x_BTC.shape[1])
    sums.add(x_BTC, None, torch.randn(1, x_BTC.shape[1], hidden, generator=generator), counts_BT)
    sums.add_output(x_BTC @ weight_HC.T, None, counts_BT)
    whole = _copy(sums)
    whole.reduce()
    sums.xx_XX = whole.xx_XX / ranks  # its lower half, too, which the earlier way had filled on one rank
    keep = torch.randperm(channels, generator=torch.Generator().manual_seed(5))[remove:].sort().values.tolist()
    ways: dict[str, Callable[[Sums], torch.Tensor]] = {
        "on rank 0 alone": partial(alone, weight_HC=weight_HC, keep=keep),
        "shared out": partial(shared, weight_HC=weight_HC, keep=keep),
    }
    seconds: dict[str, list[torch.Tensor]] = {name: [] for name in ways}
    found = {}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            own = _copy(sums)
            dist.barrier()
            start, worked = time.perf_counter(), time.process_time()
            found[name] = way(own)
            took_2 = torch.tensor([time.perf_counter() - start, time.process_time() - worked])
            dist.all_reduce(took_2, dist.ReduceOp.MAX)
            if repeat:  # the first warms up
                seconds[name].append(took_2)
    before, after = found.values()
    assert (before - after).abs().max() < 1e-3 * before.abs().max()
    if rank == 0:
        ratios = [new / old for old, new in zip(*seconds.values(), strict=True)]
        for name, pairs in [*seconds.items(), ("ratio", ratios)]:
            for what, values in zip(("clock", "processor"), torch.stack(pairs).T.tolist(), strict=True):
                low, high = min(values), max(values)
                print(f"{name}, {what}: {statistics.median(values):.3g} ({low:.3g}-{high:.3g})", flush=True)
    dist.barrier()
    os._exit(0)


def main(
    channels: int = 2048,
    hidden: int = 512,
    remove: Annotated[int, typer.Option(help="Channels that go.")] = 128,
    ranks: int = 2,
    repeats: int = 7,
) -> None:
    """Seconds of each way on the slowest rank, median (lowest-highest), and their ratio, pair by pair."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_work, (ranks, port, channels, hidden, remove, repeats), nprocs=ranks)


if __name__ == "__main__":
    typer.run(main)
