"""What ranks share out: the rows that each solves for and reads, and the regressions that each is given."""

import json
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from process_ranks import run_ranks
from test_engine import criterion_of, plan_of, policy_of, sequences
from torch.distributed.device_mesh import init_device_mesh

from ptl_rl.checkpoints.read import read_tensor
from ptl_rl.checkpoints.sharded import load_sharded
from ptl_rl.pruning import engine
from ptl_rl.pruning.choose import absorption
from ptl_rl.pruning.compensate import refit, regression
from ptl_rl.pruning.model import PrunableModel

HIDDEN = 33  # which no number of ranks divides
SIZES = {"hidden_size": HIDDEN, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}


@pytest.mark.parametrize(("ranks", "tasks", "rows"), product((1, 2, 3, 4, 8), (1, 2), (1, HIDDEN)))
def test_every_row_of_every_task_is_done_once(ranks, tasks, rows):
    done = [PrunableModel.shares(SimpleNamespace(rank=rank, ranks=ranks), rows, tasks) for rank in range(ranks)]
    for task in range(tasks):
        of_task = [list(range(rows)[part]) for shares in done for doing, part in shares if doing == task]
        assert sorted(chain.from_iterable(of_task)) == list(range(rows))
        if rows == HIDDEN:
            assert max(map(len, of_task)) - min(map(len, of_task)) <= 1
    if ranks >= tasks:
        assert max(len(shares) for shares in done) == 1  # a rank makes one factorisation


def test_rows_of_a_weight_are_read_alone(make_checkpoint):
    folder, name = make_checkpoint("llama"), "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(read_tensor(folder, name, slice(3, 9)), read_tensor(folder, name)[3:9])


def _counted(rank: int, ranks: int, folder: Path, family: str, out: Path) -> None:
    """Compensate a cut of channels and a choice of blocks; write down what this rank has solved and read."""
    seen: dict[str, list[int]] = {"absorbed": [], "stream": [], "read": [], "regressions": []}
    least_squares, ridge_regression, weight = refit.least_squares, regression.ridge_regression, PrunableModel.weight

    def counted_least_squares(weight_HC, *arguments):
        seen["absorbed"].append(len(weight_HC))
        return least_squares(weight_HC, *arguments)

    def counted_ridge_regression(xx_XX, xy_XH, *arguments):
        seen["stream"].append(xy_XH.shape[1])
        return ridge_regression(xx_XX, xy_XH, *arguments)

    def counted_weight(self, layer, name, rows=slice(None)):
        found = weight(self, layer, name, rows)
        seen["read"].append(len(found) if found.dim() == 2 else 0)
        return found

    def counted_solution(_prunable, moments, *arguments):
        seen["regressions"].append(moments.removed)
        return solved(_prunable, moments, *arguments)

    prunable = policy_of(folder, family, load_sharded(folder, init_device_mesh("cpu", (ranks,)), torch.float32))
    plan = plan_of(prunable, criterion_of("activation", layers="explicit", layer_ids=[2]), engine.Removal(18, 1))
    refit.least_squares, regression.ridge_regression = counted_least_squares, counted_ridge_regression
    PrunableModel.weight = counted_weight
    engine.compensate(prunable, plan, sequences(), out / "new")
    PrunableModel.weight = weight
    solved, absorption._solved = absorption._solved, counted_solution
    plan_of(prunable, criterion_of("activation", layers="leave_one_out"), engine.Removal(0, 1))
    (out / f"{rank}.json").write_text(json.dumps(seen))


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_solves_for_its_share_only(ranks, make_checkpoint, tmp_path):
    run_ranks(_counted, ranks, make_checkpoint("llama", num_hidden_layers=4, **SIZES), "llama", tmp_path)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    down_projs, o_projs = 3, 2  # nothing is lost yet before the first block's attention
    # The columns' two regressions are made by different ranks, the one that is left over helps with the first.
    absorbed = [sorted(part["absorbed"]) for part in seen]
    assert absorbed == {2: [[], [33] * 3], 3: [[], [33] * 3, []]}[ranks]
    whole = (down_projs + o_projs) * HIDDEN
    of_down_proj, of_o_proj = {2: ([33, 0], [16, 17]), 3: ([16, 0, 17], [11, 11, 11])}[ranks]
    for down, o, part in zip(of_down_proj, of_o_proj, seen, strict=True):
        assert sum(part["stream"]) == down_projs * down + o_projs * o
    # Weights are read where they are solved for: the removed and kept columns by one, `o_proj` by all.
    assert sum(sum(part["read"]) for part in seen) == whole
    assert max(sum(part["read"]) for part in seen) < whole
    # Of four blocks three have one before them that could take over.
    assert sorted(chain.from_iterable(part["regressions"] for part in seen)) == [1, 2, 3]
    assert max(len(part["regressions"]) for part in seen) == {2: 2, 3: 1}[ranks]
