"""Which blocks go.

Several blocks are chosen one at a time, each by what is measured without those before it: two blocks that can each be
done without need not both be.
"""

from collections.abc import Callable

import torch


def greedy(importance: Callable[[list[int]], torch.Tensor], remove: int) -> list[int]:
    """Ids of ``remove`` blocks, first removed first.

    Args:
        importance: gives (L,) importance of all blocks once those it is handed are gone; theirs does not matter.
    """
    gone: list[int] = []
    for _ in range(remove):
        importance_L = importance(gone).nan_to_num(nan=torch.inf)  # a model that breaks without the block needs it
        importance_L[gone] = torch.inf
        gone.append(int(importance_L.argmin()))
    return gone


def explicit(ids: list[int], removed_before: int, remove: int) -> list[int]:
    """The next ``remove`` of the blocks ``ids``, as the present model numbers them.

    Args:
        ids: of the original model, in the order in which they go.
        removed_before: how many of them are gone already.
    """
    gone, now = ids[:removed_before], ids[removed_before : removed_before + remove]
    return [block - sum(earlier < block for earlier in gone) for block in now]
