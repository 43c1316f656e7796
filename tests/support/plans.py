"""Pruning plans of tests, where only what they keep matters."""

from collections.abc import Sequence

from ptl_rl.pruning.plan import PruningPlan


def plan_keeping(keep_channels: list[list[int]], width: int, gone: Sequence[int] = ()) -> PruningPlan:
    """Of blocks of ``width`` channels: those that stay in each, and the blocks that go, first removed first."""
    return PruningPlan(
        keep_channels=keep_channels,
        keep_layers=[layer for layer in range(len(keep_channels)) if layer not in gone],
        layer_order=list(gone),
        source_intermediate_size=width,
        alignment=1,
        channel_criterion="obs",
        layer_criterion="leave_one_out",
        subset_hash="",
        source="",
    )
