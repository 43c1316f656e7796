"""What the pruning worker does before there is anything to prune."""

import torch

from ptl_rl.pruning import worker


def test_a_rank_stays_on_the_gpu_that_verl_chose(monkeypatch):
    """Where Ray leaves all of a node's GPUs visible, verl sets the rank's own; 0 would put every rank on the first."""
    chosen = [3]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    worker.claim_gpu()
    assert chosen == [3, 3]
