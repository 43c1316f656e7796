"""The closed forms against brute force: dense solves, one-at-a-time removal, and the definition of the error."""

from types import SimpleNamespace

import pytest
import torch
from process_ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from ptl_rl.checkpoints.sharded import load_sharded
from ptl_rl.data.encoding import Sequence
from ptl_rl.families import FAMILIES
from ptl_rl.pruning.compensate.algebra import least_squares, obs_importance, removal_order
from ptl_rl.pruning.score.calibration import batches_for_rank
from ptl_rl.pruning.score.moments import SecondMoments, as_read
from ptl_rl.pruning.score.streaming import stream

WIDTH, HIDDEN, TOKENS, RIDGE = 24, 7, 400, 1e-6


def activations(seed: int = 0) -> torch.Tensor:
    """Correlated channels, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    mixing_FC = torch.randn(WIDTH // 2, WIDTH, generator=generator, dtype=torch.float64)
    noise_NC = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return torch.randn(TOKENS, WIDTH // 2, generator=generator, dtype=torch.float64) @ mixing_FC + 0.3 * noise_NC


def weight(seed: int = 1) -> torch.Tensor:
    return torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KEEP = [0, 3, 4, 8, 11, 12, 15, 16, 20, 23]


def test_least_squares_is_the_regression_on_the_kept_channels():
    hidden_NC, weight_HC = activations(), weight()
    fit = least_squares(weight_HC, hidden_NC.T @ hidden_NC, KEEP, 1e-12)
    output_NH = hidden_NC @ weight_HC.T
    expected_KH = torch.linalg.lstsq(hidden_NC[:, KEEP], output_NH).solution
    torch.testing.assert_close(fit.weight_HK, expected_KH.T.float(), rtol=1e-4, atol=1e-5)
    plain = (hidden_NC[:, KEEP] @ weight_HC[:, KEEP].T - output_NH).square().sum()
    left = (hidden_NC[:, KEEP] @ expected_KH - output_NH).square().sum()
    assert fit.lost_plain == pytest.approx(float(plain), rel=1e-9)
    assert fit.lost == pytest.approx(float(left), rel=1e-6)
    assert fit.lost < 0.5 * fit.lost_plain  # correlated channels can stand in for each other


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 3.0])
def test_what_is_lost_is_the_new_weights_own_error(ridge):
    hidden_NC, weight_HC = activations(), weight()
    fit = least_squares(weight_HC, hidden_NC.T @ hidden_NC, KEEP, ridge)
    error_NH = hidden_NC[:, KEEP] @ fit.weight_HK.double().T - hidden_NC @ weight_HC.T
    assert fit.lost == pytest.approx(float(error_NH.square().sum()), rel=1e-6)


def test_rows_are_solved_for_by_themselves():
    moment_CC, weight_HC = activations().T @ activations(), weight()
    whole, parts = (
        [least_squares(weight_HC[rows], moment_CC, KEEP, RIDGE) for rows in cuts]
        for cuts in ([slice(None)], [slice(0, 3), slice(3, 7)])
    )
    torch.testing.assert_close(torch.cat([part.weight_HK for part in parts]), whole[0].weight_HK)
    for name in ("lost_plain", "lost"):
        assert sum(getattr(part, name) for part in parts) == pytest.approx(getattr(whole[0], name))


def test_a_huge_ridge_leaves_the_kept_columns_as_they_are():
    hidden_NC, weight_HC = activations(), weight()
    fit = least_squares(weight_HC, hidden_NC.T @ hidden_NC, KEEP, 1e12)
    torch.testing.assert_close(fit.weight_HK, weight_HC[:, KEEP].float())
    assert fit.lost == pytest.approx(fit.lost_plain)


def test_a_layer_that_never_fires_is_left_alone():
    fit = least_squares(weight(), torch.zeros(WIDTH, WIDTH), KEEP, RIDGE)
    torch.testing.assert_close(fit.weight_HK, weight()[:, KEEP].float())
    assert (fit.lost_plain, fit.lost) == (0.0, 0.0)


def cost_of_removing(removed: list[int], weight_HC: torch.Tensor, ridged_CC: torch.Tensor) -> float:
    """Least quadratic loss of any change of the weights that zeroes the removed columns."""
    keep = [j for j in range(WIDTH) if j not in removed]
    change_HC = torch.zeros_like(weight_HC)
    change_HC[:, removed] = -weight_HC[:, removed]
    solved = torch.linalg.solve(ridged_CC[keep][:, keep], ridged_CC[keep][:, removed] @ weight_HC[:, removed].T)
    change_HC[:, keep] = solved.T
    return float(((change_HC @ ridged_CC) * change_HC).sum())


@pytest.mark.parametrize("block", [1, 4, 24])
def test_removal_order_is_greedy(block):
    weight_HC = weight()
    moment_CC = activations().T @ activations()
    ridged_CC = moment_CC + RIDGE * moment_CC.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    expected: list[int] = []
    while len(expected) < 14:
        rest = [j for j in range(WIDTH) if j not in expected]
        expected.append(min(rest, key=lambda j: cost_of_removing([*expected, j], weight_HC, ridged_CC)))
    order, costs_C = removal_order(weight_HC, moment_CC, 14, RIDGE, block=block)
    if block == 1 or block == 24:  # 24: all channels are candidates, so nothing is approximate
        assert order == expected
    found = cost_of_removing(order, weight_HC, ridged_CC)
    assert found <= 1.05 * cost_of_removing(expected, weight_HC, ridged_CC)
    assert costs_C[order].isinf().all()
    now = cost_of_removing(order, weight_HC, ridged_CC)
    for j in [j for j in range(WIDTH) if j not in order][:3]:
        assert float(costs_C[j]) == pytest.approx(cost_of_removing([*order, j], weight_HC, ridged_CC) - now, rel=1e-5)


def test_obs_beats_rms_contribution_on_correlated_channels():
    hidden_NC, weight_HC = activations(), weight()
    moment_CC = hidden_NC.T @ hidden_NC
    by_rms = (moment_CC.diagonal().sqrt() * weight_HC.norm(dim=0)).argsort()[:14].tolist()
    errors = {}
    for name, removed in {"rms": by_rms, "obs": removal_order(weight_HC, moment_CC, 14, RIDGE)[0]}.items():
        keep = [j for j in range(WIDTH) if j not in removed]
        errors[name] = least_squares(weight_HC, moment_CC, keep, RIDGE).lost
    assert errors["obs"] < errors["rms"]


def test_obs_importance_puts_the_removed_lowest_in_their_order():
    moment_CC = activations().T @ activations()
    order, costs_C = removal_order(weight(), moment_CC, 10, RIDGE)
    importance_C = obs_importance(weight(), moment_CC, 10, RIDGE)
    assert importance_C.argsort()[:10].tolist() == order
    survivors = [j for j in range(WIDTH) if j not in order]
    assert importance_C[survivors].argsort().tolist() == costs_C[survivors].argsort().tolist()


def sequences() -> list[Sequence]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sequence(torch.randint(0, 290, (n,), generator=generator).tolist(), n // 2) for n in (5, 9, 17, 3, 30, 12, 8)
    ]


def moments_of(model, family: str, rank: int = 0, ranks: int = 1) -> dict[int, torch.Tensor]:
    moments = SecondMoments(3, 48, torch.device("cpu"))
    batches = batches_for_rank(sequences(), 2, rank, ranks, 0, 0.3)
    stream(model, FAMILIES[family], batches, [moments], torch.device("cpu"))
    return {layer: moments.take(layer) for layer in moments.layers}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_moments_equal_their_definition(family, make_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(family)).eval()
    found = moments_of(model, family)
    hidden: dict[int, list] = {}
    for layer, block in enumerate(model.model.layers):
        block.mlp.down_proj.register_forward_pre_hook(lambda _m, x, i=layer: hidden.setdefault(i, []).append(x[0][0]))
    with torch.no_grad():
        for sequence in sequences():
            model(input_ids=torch.tensor([sequence.ids]), use_cache=False)
    reading = [max(sequence.prompt_tokens - 1, 0) for sequence in sequences()]
    weight_N = torch.cat(
        [torch.tensor([0.3] * n + [1.0] * (len(s.ids) - n)) for n, s in zip(reading, sequences(), strict=True)]
    )
    for layer, moment_CC in found.items():
        h_NC = torch.cat(hidden[layer])
        counts_N = weight_N
        if FAMILIES[family].output_norm:  # an output half as long is twice as long behind the norm
            output_NH = h_NC @ model.model.layers[layer].mlp.down_proj.weight.detach().T
            counts_N = weight_N / (output_NH.square().mean(-1) + model.config.rms_norm_eps)
        expected_CC = h_NC.T @ (h_NC * counts_N[:, None])
        torch.testing.assert_close(moment_CC, expected_CC, rtol=1e-3, atol=1e-5 * float(counts_N.max()))


def _moments_on_ranks(rank: int, ranks: int, folder: str, out: str) -> None:
    model = load_sharded(folder, init_device_mesh("cpu", (ranks,)), torch.float32)
    torch.save(moments_of(model, "qwen2", rank, ranks), f"{out}.{rank}")


@pytest.mark.parametrize("ranks", [4])
def test_every_block_is_summed_on_one_rank(ranks, make_checkpoint, tmp_path):
    folder = make_checkpoint("qwen2")
    run_ranks(_moments_on_ranks, ranks, folder, str(tmp_path / "out"))
    expected = moments_of(AutoModelForCausalLM.from_pretrained(folder).eval(), "qwen2")
    found: dict[int, torch.Tensor] = {}
    for rank in range(ranks):
        own = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        assert not own.keys() & found.keys()
        found |= own
    assert found.keys() == expected.keys()
    for layer, moment_CC in expected.items():
        torch.testing.assert_close(found[layer], moment_CC, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("cuda", torch.bfloat16, "high"), ("cuda", torch.float32, "highest"), ("cpu", torch.bfloat16, "highest")],
)
def test_products_are_as_exact_as_what_was_read(device, dtype, expected):
    with pytest.raises(RuntimeError), as_read(SimpleNamespace(device=torch.device(device), dtype=dtype)):
        assert torch.get_float32_matmul_precision() == expected
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "highest"
