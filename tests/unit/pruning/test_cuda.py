"""The same on a GPU as on CPUs: scores, compensated weights and slices, in one process and sharded under NCCL."""

from pathlib import Path

import pytest
import torch
from process_ranks import run_ranks
from test_engine import criterion_of, policy_of, sequences
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from ptl_rl.checkpoints.sharded import load_sharded
from ptl_rl.families import FAMILIES
from ptl_rl.pruning import engine
from ptl_rl.pruning.choose.choice import make_plan
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.moments import SecondMoments
from ptl_rl.pruning.slice.slicing import load_new_weight, slice_checkpoint
from ptl_rl.pruning.slice.verify import logit_difference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUT = engine.Removal(channels=18, layers=1)


def on_gpu(folder: Path, family: str, model=None, dtype: torch.dtype = torch.float32) -> engine.PrunableModel:
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval().requires_grad_(False)
    return engine.PrunableModel(model, FAMILIES[family], folder, torch.device("cuda"), 2, 0, 0.3)


def scored(
    prunable: engine.PrunableModel, out: Path, sensitivity: bool, compensated: PruningPlan | None = None
) -> PruningPlan:
    """Plan of a cut by ``obs`` and measured losses; the new weights of ``compensated``, or of itself, go to ``out``."""
    criterion = criterion_of(layers="leave_one_out")
    scores = engine.score(prunable, criterion, CUT, sequences(), general=[], sensitivity=sensitivity)
    plan = make_plan(scores, criterion, remove_channels=18, alignment=1, subset_hash="", source=prunable.source)
    losses = engine.compensate(prunable, compensated or plan, sequences(), out, sensitivity=sensitivity)
    assert losses.stream is not None and 0 < losses.stream < 1
    return plan


def check_equal(prunable: engine.PrunableModel, expected: PruningPlan, out: Path, sensitivity: bool) -> None:
    """``out`` holds the new weights that the CPU found for the plan."""
    plan = scored(prunable, out / "gpu", sensitivity, compensated=expected)
    assert plan.layer_order == expected.layer_order
    assert plan.keep_channels == expected.keep_channels
    for layer in plan.keep_layers:
        for projection in ("o_proj", "down_proj"):
            of_cpu, of_gpu = (load_new_weight(out / name, layer, projection) for name in ("cpu", "gpu"))
            torch.testing.assert_close(of_gpu, of_cpu, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sensitivity", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_process(family, sensitivity, make_checkpoint, tmp_path):
    folder = make_checkpoint(family)
    expected = scored(policy_of(folder, family), tmp_path / "cpu", sensitivity)
    check_equal(on_gpu(folder, family), expected, tmp_path, sensitivity)


def _sharded(_rank: int, _ranks: int, expected: PruningPlan, family: str, out: Path, tokenizer) -> None:
    torch.cuda.set_device(0)
    mesh, folder = init_device_mesh("cuda", (1,)), Path(expected.source)
    check_equal(
        on_gpu(folder, family, load_sharded(folder, mesh, torch.float32, attention="eager")),
        expected,
        out,
        sensitivity=False,
    )
    slice_checkpoint(folder, expected, out / "sliced", new_weights=out / "gpu")
    difference = logit_difference(
        lambda of: load_sharded(of, mesh, torch.float32, attention="eager"),
        FAMILIES[family],
        folder,
        expected,
        out / "sliced",
        tokenizer,
        ["Mia has 14 marbles and gives 8 away.", "How many has she now, and how many did she have?"],
        out / "gpu",
    )
    assert difference < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_sharded(family, make_checkpoint, tokenizer, tmp_path):
    expected = scored(policy_of(make_checkpoint(family), family), tmp_path / "cpu", sensitivity=False)
    run_ranks(_sharded, 1, expected, family, tmp_path, tokenizer, backend="nccl")


def test_products_of_16_bits_lose_nothing_by_tf32(make_checkpoint):
    """Of bfloat16 activations, TF32's factors are exact where positions count alike, and its sums are float32."""
    prunable = on_gpu(make_checkpoint("llama", intermediate_size=512), "llama", dtype=torch.bfloat16)
    prunable.prompt_weight = 1.0
    seen: list[torch.Tensor] = []

    class Exact(SecondMoments):
        def on_channels(self, layer, hidden_NC, weight_N):
            if layer == 1:
                seen.append(hidden_NC[weight_N > 0].double())
            super().on_channels(layer, hidden_NC, weight_N)

    moments = Exact(3, 512, prunable.device)
    prunable.read(sequences(), [moments])
    hidden_NC = torch.cat(seen)
    expected_CC = hidden_NC.T @ hidden_NC
    assert hidden_NC.abs().max() > 0
    assert (moments.take(1).double() - expected_CC).abs().max() / expected_CC.abs().max() < 1e-6
    assert torch.get_float32_matmul_precision() == "highest"
