"""Closed-form algebra of one block's channels: what the kept columns of ``down_proj`` take over from the removed ones.

With ``C = E[h h^T]`` over calibration tokens, the weights over the kept channels K that come nearest to the original
output in the mean square are ``W_K + W_D C_DK (C_KK + ridge)^-1`` (D: the removed ones). The sliced block stays stock:
only numbers change. Choosing channels by the same algebra is the optimal brain surgeon (Hassibi and Stork, 1993)
applied to columns: removing channel j costs ``||W_j||^2 / (C^-1)_jj`` once the others have made up for it.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fit:
    """What slicing does to one block's FFN output over the calibration tokens."""

    weight_HK: torch.Tensor
    """New ``down_proj`` weight over the kept channels, float32."""
    lost_plain: float
    """Sum (mean, if the moments are means) of the squares of what is lost if the kept columns stay as they are."""
    lost: float
    """The same with ``weight_HK``."""


def _ridge(moment_CC: torch.Tensor, ridge: float) -> float:
    """``ridge`` times the mean of the diagonal, for all channels alike, also for those that never fire."""
    mean = float(moment_CC.diagonal().double().mean())
    return ridge * mean if mean > 0 else 1.0


def _ridged(moment_CC: torch.Tensor, ridge: float) -> torch.Tensor:
    """float64 copy with the ridge added to its diagonal."""
    ridged_CC = moment_CC.to(torch.float64, copy=True)
    ridged_CC.diagonal().add_(_ridge(moment_CC, ridge))
    return ridged_CC


def least_squares(weight_HC: torch.Tensor, moment_CC: torch.Tensor, keep: list[int], ridge: float) -> Fit:
    """Let the kept columns of ``weight_HC`` take over what the removed ones contributed.

    Rows are independent of each other, so that they can be shared out, and the fits' losses added up.

    Args:
        weight_HC: ``down_proj`` weight, or some of its rows, any floating type.
        moment_CC: sum or mean of ``h h^T`` over calibration tokens, on the device that solves.
        keep: ascending ids of the channels that stay.
        ridge: relative to the mean of the diagonal; holds the new columns near the old ones where data says little.
    """
    device = moment_CC.device
    weight_HC = weight_HC.to(device, torch.float64)
    kept_K = torch.tensor(keep, device=device)
    is_removed_C = torch.ones(len(moment_CC), dtype=torch.bool, device=device)
    is_removed_C[kept_K] = False
    removed_D = is_removed_C.nonzero().flatten()
    removed_HD = weight_HC[:, removed_D]
    lost_plain = ((removed_HD @ moment_CC[removed_D][:, removed_D].double()) * removed_HD).sum()
    wanted_KH = moment_CC[kept_K][:, removed_D].double() @ removed_HD.T
    added = _ridge(moment_CC, ridge)
    ridged_KK = moment_CC[kept_K][:, kept_K].double()
    ridged_KK.diagonal().add_(added)
    gain_HK = torch.cholesky_solve(wanted_KH, torch.linalg.cholesky(ridged_KK)).T
    # With G the gain, p = W_D C_DD W_D^T - 2 G C_KD W_D^T + G C_KK G^T is lost, and G (C_KK + ridge) = W_D C_DK.
    lost = lost_plain - (gain_HK * wanted_KH.T).sum() - added * gain_HK.square().sum()
    return Fit((weight_HC[:, kept_K] + gain_HK).float(), float(lost_plain), max(0.0, float(lost)))


def removal_order(
    weight_HC: torch.Tensor, moment_CC: torch.Tensor, remove: int, ridge: float, *, block: int | None = None
) -> tuple[list[int], torch.Tensor]:
    """Greedy optimal brain surgeon over the columns of ``down_proj``: which ``remove`` channels go, in which order.

    Channels go one at a time, each the one whose removal costs least given all before it. Within a block of removals
    only the cheapest few candidates are kept up to date; the inverse and the weights follow once per block, as matrix
    products.

    Args:
        block: removals of a block; by default 16, and more than that above 4096 channels, where following costs most.

    Returns:
        Ids of the removed channels, first removed first, and (C,) float64 costs of the survivors' removal (infinite
        for the removed), relative to each other only.
    """
    weight_HC = weight_HC.to(moment_CC.device, torch.float64, copy=True)
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(_ridged(moment_CC, ridge)))
    is_gone_C = torch.zeros(weight_HC.shape[1], dtype=torch.bool, device=moment_CC.device)
    order: list[int] = []
    block = block or max(16, weight_HC.shape[1] // 256)

    def costs_C() -> torch.Tensor:
        costs = weight_HC.square().sum(0) / inverse_CC.diagonal().clamp_min(1e-300)
        return costs.masked_fill(is_gone_C, torch.inf)

    while len(order) < remove:
        wanted = min(block, remove - len(order))
        candidates_N = costs_C().topk(min(4 * wanted, weight_HC.shape[1] - len(order)), largest=False).indices
        chosen = _greedy(weight_HC[:, candidates_N], inverse_CC[candidates_N][:, candidates_N], wanted)
        gone_B = candidates_N[torch.tensor(chosen, device=candidates_N.device)]
        solved_BC = torch.linalg.solve(inverse_CC[gone_B][:, gone_B], inverse_CC[gone_B])
        weight_HC -= weight_HC[:, gone_B] @ solved_BC
        inverse_CC -= inverse_CC[:, gone_B] @ solved_BC
        weight_HC[:, gone_B] = 0
        is_gone_C[gone_B] = True
        order += gone_B.tolist()
    return order, costs_C()


def obs_importance(weight_HC: torch.Tensor, moment_CC: torch.Tensor, remove: int, ridge: float) -> torch.Tensor:
    """(C,) float32 importance by :func:`removal_order`: the removed have their place in it, the others lie above."""
    order, costs_C = removal_order(weight_HC, moment_CC, remove, ridge)
    finite_C = costs_C.masked_fill(costs_C.isinf(), 0.0)
    importance_C = remove + finite_C / finite_C.max().clamp_min(1e-300)
    importance_C[torch.tensor(order, dtype=torch.long, device=costs_C.device)] = torch.arange(
        len(order), dtype=torch.float64, device=costs_C.device
    )
    return importance_C.float()


def _greedy(weight_HN: torch.Tensor, inverse_NN: torch.Tensor, count: int) -> list[int]:
    """The first ``count`` removals among N candidates, exact within them; positions in removal order."""
    # All that the costs need of the weights is their Gram matrix, which is as small as the candidates are few.
    gram_NN, inverse_NN, chosen = weight_HN.T @ weight_HN, inverse_NN.clone(), []
    open_N = torch.ones(len(gram_NN), dtype=torch.bool, device=gram_NN.device)
    for _ in range(count):
        costs_N = gram_NN.diagonal() / inverse_NN.diagonal().clamp_min(1e-300)
        j = int(costs_N.masked_fill(~open_N, torch.inf).argmin())
        ratio_N = inverse_NN[j] / inverse_NN[j, j]
        # W' = W - w_j ratio^T, so W'^T W' = G - G_j ratio^T - ratio G_j^T + G_jj ratio ratio^T.
        gram_j = gram_NN[:, j].clone()
        cross_NN = torch.outer(gram_j, ratio_N)
        gram_NN = gram_NN - cross_NN - cross_NN.T + gram_j[j] * torch.outer(ratio_N, ratio_N)
        inverse_NN = inverse_NN - torch.outer(inverse_NN[:, j], ratio_N)
        open_N[j] = False
        chosen.append(j)
    return chosen
