"""Scores are exact sums over real tokens, whatever the batching, padding and number of ranks."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from ptl_rl.families import FAMILIES
from ptl_rl.pruning.calibration import Collector, Sequence, batches_for_rank, stream
from ptl_rl.pruning.criteria import activation, block_influence, rms_contribution
from ptl_rl.pruning.plan import choose
from ptl_rl.pruning.sharded import load_sharded

WIDTH = 48
PROMPT_WEIGHT = 0.3


def sequences():
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 9, 17, 3, 30, 12, 8]
    return [Sequence(torch.randint(0, 290, (n,), generator=generator).tolist(), n // 2) for n in lengths]


def collect(model, family, batch_size=3, rank=0, ranks=1, sensitivity=False):
    collector = Collector(model, FAMILIES[family], WIDTH, torch.device("cpu"))
    batches = batches_for_rank(sequences(), batch_size, rank, ranks, 0, PROMPT_WEIGHT)
    stream(model, FAMILIES[family], batches, [collector], torch.device("cpu"), sensitivity=sensitivity)
    return collector.reduce()


def weights_N() -> torch.Tensor:
    """By the definition: what writes the response counts 1, what only reads the question PROMPT_WEIGHT."""
    weights = []
    for sequence in sequences():
        reading = max(sequence.prompt_tokens - 1, 0)
        weights += [PROMPT_WEIGHT] * reading + [1.0] * (len(sequence.ids) - reading)
    return torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_equal_their_definition(family, make_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(family)).eval()
    statistics = collect(model, family)
    hidden: dict[int, list] = {}
    changes: dict[int, list] = {}
    for layer, block in enumerate(model.model.layers):
        block.mlp.down_proj.register_forward_pre_hook(lambda _m, x, i=layer: hidden.setdefault(i, []).append(x[0][0]))
        block.register_forward_hook(
            lambda _m, x, out, i=layer: changes.setdefault(i, []).append(
                ((out[0] if isinstance(out, tuple) else out) - x[0]).reshape(-1, 32)
            )
        )
    with torch.no_grad():
        for sequence in sequences():
            model(input_ids=torch.tensor([sequence.ids]), use_cache=False)
    weight_N = weights_N()
    share_N = weight_N / weight_N.sum()
    assert statistics.block_weight_L.tolist() == pytest.approx([float(weight_N.sum())] * 3, rel=1e-6)
    for layer, block in enumerate(model.model.layers):
        h_NC = torch.cat(hidden[layer]).double()
        norm_C = block.mlp.down_proj.weight.double().norm(dim=0)
        torch.testing.assert_close(activation(statistics)[layer].double(), share_N @ h_NC.abs(), rtol=2e-4, atol=1e-7)
        expected_C = (share_N @ h_NC.square()).sqrt() * norm_C
        torch.testing.assert_close(rms_contribution(statistics)[layer].double(), expected_C, rtol=2e-4, atol=1e-7)
        change = share_N.float() @ torch.cat(changes[layer]).norm(dim=-1)
        torch.testing.assert_close(block_influence(statistics)[layer], change, rtol=2e-4, atol=1e-6)


def nudge_ffns(model, nudge_LTH, hidden):
    """Add something to every FFN's output, and keep what went into its ``down_proj``."""

    def hook(layer):
        def add(_module, inputs, output):
            hidden[layer] = inputs[0][0].detach()
            return output + nudge_LTH[layer]

        return add

    return [block.mlp.down_proj.register_forward_hook(hook(i)) for i, block in enumerate(model.model.layers)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sensitivity_is_the_gradient_at_the_ffns_output(family, make_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(family)).eval()
    statistics = collect(model.requires_grad_(False), family, sensitivity=True)
    square_LC = torch.zeros(3, WIDTH, dtype=torch.float64)
    total_L = torch.zeros(3, dtype=torch.float64)
    for sequence in sequences():
        batch = next(batches_for_rank([sequence], 1, 0, 1, 0, PROMPT_WEIGHT))
        hidden: dict[int, torch.Tensor] = {}
        nudge_LTH = torch.zeros(3, len(sequence.ids), 32, requires_grad=True)
        handles = nudge_ffns(model, nudge_LTH, hidden)
        logits_TV = model(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0]
        cumulative_TV = (logits_TV.detach() / 2).softmax(-1).cumsum(-1)
        drawn_T = [int(torch.searchsorted(row, u)) for row, u in zip(cumulative_TV, batch.uniform_BT[0], strict=True)]
        log_p_TV = logits_TV.log_softmax(-1)
        first = max(sequence.prompt_tokens - 1, 0)  # what is drawn for the response, not for the question or after it
        sum(log_p_TV[t, drawn_T[t]] for t in range(first, len(sequence.ids) - 1)).backward()
        for handle in handles:
            handle.remove()
        for layer in range(3):
            weight_T = nudge_LTH.grad[layer].norm(dim=-1).double()
            square_LC[layer] += weight_T @ hidden[layer].double().square()
            total_L[layer] += weight_T.sum()
    torch.testing.assert_close(statistics.square_sum_LC, square_LC, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(statistics.channel_weight_L, total_L, rtol=1e-3, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())


def _rank_main(rank: int, ranks: int, port: int, folder: str, family: str, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    model = load_sharded(folder, init_device_mesh("cpu", (ranks,)), torch.float32)
    local = sum(p.to_local().numel() for p in model.parameters())
    model.requires_grad_(False)
    statistics = collect(model, family, batch_size=2, rank=rank, ranks=ranks)
    sensitive = collect(model, family, batch_size=2, rank=rank, ranks=ranks, sensitivity=True)
    logits_BTV = model(input_ids=torch.arange(20)[None], use_cache=False).logits
    if rank == 0:
        scores = {"rms": rms_contribution(statistics), "influence": block_influence(statistics)}
        scores |= {"sensitive": rms_contribution(sensitive), "weight": sensitive.channel_weight_L}
        torch.save({**scores, "logits": logits_BTV.detach(), "local": local}, out)
    dist.barrier()
    # FSDP's modules keep the process group alive into the interpreter's end, where its threads may abort the process.
    os._exit(0)


@pytest.mark.parametrize(("family", "ranks"), [("qwen2", 1), ("qwen2", 2), ("llama", 4), ("gemma3_text", 2)])
def test_any_number_of_ranks_gives_the_same_scores(family, ranks, make_checkpoint, tmp_path):
    from pathlib import Path

    folder: Path = make_checkpoint(family)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank_main, (ranks, port, folder, family, str(tmp_path / "out.pt")), nprocs=ranks)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    statistics = collect(model, family)
    sensitive = collect(model.requires_grad_(False), family, sensitivity=True)
    torch.testing.assert_close(found["sensitive"], rms_contribution(sensitive), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found["weight"], sensitive.channel_weight_L, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found["rms"], rms_contribution(statistics), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["influence"], block_influence(statistics), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        logits_BTV = model(input_ids=torch.arange(20)[None], use_cache=False).logits
    torch.testing.assert_close(found["logits"], logits_BTV, rtol=1e-4, atol=1e-5)
    total = sum(p.numel() for p in model.parameters())
    assert found["local"] <= total / ranks + 600  # a shard, not the model: uneven rows are all that is added


@pytest.mark.parametrize("sensitivity", [True, False])
def test_sequences_in_which_nothing_counts_are_refused(sensitivity, make_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("qwen2")).eval().requires_grad_(False)
    collector = Collector(model, FAMILIES["qwen2"], WIDTH, torch.device("cpu"))
    only_questions = [Sequence(sequence.ids, len(sequence.ids) + 1) for sequence in sequences()]
    batches = batches_for_rank(only_questions, 3, 0, 1, 0, 0.0)
    stream(model, FAMILIES["qwen2"], batches, [collector], torch.device("cpu"), sensitivity=sensitivity)
    with pytest.raises(ValueError, match=r"calibration\.max_tokens cuts every one of them"):
        collector.reduce()


def test_choice_is_by_rank_and_ties_go_to_the_lower_index():
    importance_LC = torch.tensor([[3.0, 1.0, 2.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    channels, layers = choose(importance_LC, torch.tensor([0.5, 0.1]), remove_channels=2, remove_layers=1)
    assert channels == [[0, 3], [0, 1]]
    assert layers == [0]
