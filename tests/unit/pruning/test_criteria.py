"""Scores are exact sums over real tokens, whatever the batching, padding and number of ranks."""

import pytest
import torch
from process_ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from ptl_rl.checkpoints.sharded import load_sharded
from ptl_rl.data.encoding import Sequence
from ptl_rl.families import FAMILIES
from ptl_rl.pruning.score.calibration import batches_for_rank
from ptl_rl.pruning.score.criteria import (
    activation,
    block_influence,
    cosine,
    fluctuation,
    magnitude,
    rms_contribution,
    taylor,
    wanda,
)
from ptl_rl.pruning.score.statistics import Collector, Needs
from ptl_rl.pruning.score.streaming import mean_loss, stream

WIDTH = 48
PROMPT_WEIGHT = 0.3
CHEAP = Needs()


def sequences():
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 9, 17, 3, 30, 12, 8]
    return [Sequence(torch.randint(0, 290, (n,), generator=generator).tolist(), n // 2) for n in lengths]


def collect(model, family, batch_size=3, rank=0, ranks=1, sensitivity=False, needs=CHEAP):
    collector = Collector(model, FAMILIES[family], WIDTH, torch.device("cpu"), needs)
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
    cosines: dict[int, list] = {}

    def on_block(layer, before_TH, after_TH):
        changes.setdefault(layer, []).append((after_TH - before_TH).reshape(-1, 32))
        cosines.setdefault(layer, []).append(torch.cosine_similarity(after_TH, before_TH, dim=-1).flatten())

    for layer, block in enumerate(model.model.layers):
        block.mlp.down_proj.register_forward_pre_hook(lambda _m, x, i=layer: hidden.setdefault(i, []).append(x[0][0]))
        block.register_forward_hook(
            lambda _m, x, out, i=layer: on_block(i, x[0], out[0] if isinstance(out, tuple) else out)
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
        mean_C = share_N @ h_NC
        variance_C = share_N @ (h_NC - mean_C).square()
        torch.testing.assert_close(
            fluctuation(statistics)[layer].double(), variance_C * norm_C.square(), rtol=2e-4, atol=1e-8
        )
        expected_C = (share_N @ h_NC.square()).sqrt() * block.mlp.down_proj.weight.double().abs().sum(0)
        torch.testing.assert_close(wanda(statistics)[layer].double(), expected_C, rtol=2e-4, atol=1e-7)
        weights_XC = torch.cat([block.mlp.gate_proj.weight.T, block.mlp.up_proj.weight.T, block.mlp.down_proj.weight])
        torch.testing.assert_close(magnitude(statistics)[layer], weights_XC.norm(dim=0), rtol=1e-5, atol=0)
        expected = 1 - share_N.float() @ torch.cat(cosines[layer])
        torch.testing.assert_close(cosine(statistics)[layer], expected, rtol=1e-3, atol=1e-6)
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


def losses(model, sequence: Sequence) -> torch.Tensor:
    """Weighted negative log-likelihood of one sequence, by the definition."""
    log_p_TV = model(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0].log_softmax(-1)
    reading = max(sequence.prompt_tokens - 1, 0)
    return sum(
        -log_p_TV[t, sequence.ids[t + 1]] * (PROMPT_WEIGHT if t < reading else 1.0)
        for t in range(len(sequence.ids) - 1)
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_taylor_is_the_first_order_of_the_losss_change(family, make_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(family)).eval().requires_grad_(False)
    found_LC = taylor(collect(model, family, needs=Needs(gradients=True)))
    expected_LC = torch.zeros(3, WIDTH)
    for sequence in sequences():
        # h times the gradient is what scaling the channel at that position does to the loss.
        scale_LTC = torch.ones(3, len(sequence.ids), WIDTH, requires_grad=True)
        handles = [
            block.mlp.down_proj.register_forward_pre_hook(lambda _m, x, scale_TC=scale_LTC[i]: (x[0] * scale_TC,))
            for i, block in enumerate(model.model.layers)
        ]
        losses(model, sequence).backward()
        for handle in handles:
            handle.remove()
        expected_LC += scale_LTC.grad.abs().sum(1)
    torch.testing.assert_close(found_LC, expected_LC / weights_N().sum().float(), rtol=1e-3, atol=1e-8)


def test_mean_loss_is_the_weighted_mean(make_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama")).eval().requires_grad_(False)
    found = mean_loss(model, batches_for_rank(sequences(), 3, 0, 1, 0, PROMPT_WEIGHT), torch.device("cpu"))
    # The last position of a sequence predicts nothing.
    total = float(weights_N().sum()) - len(sequences())
    assert found == pytest.approx(float(sum(losses(model, sequence) for sequence in sequences())) / total, rel=1e-5)


def test_a_sequence_counts_as_its_weight_says(make_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama")).eval()
    whole, halved = sequences()[:2], [sequences()[0], Sequence(sequences()[1].ids, sequences()[1].prompt_tokens, 0.5)]
    sums = []
    for chosen in (whole, halved, whole[1:]):
        collector = Collector(model, FAMILIES["llama"], WIDTH, torch.device("cpu"))
        batches = batches_for_rank(chosen, 2, 0, 1, 0, PROMPT_WEIGHT)
        stream(model, FAMILIES["llama"], batches, [collector], torch.device("cpu"))
        sums.append(collector.reduce().abs_sum_LC)
    torch.testing.assert_close(sums[0] - 0.5 * sums[2], sums[1], rtol=1e-4, atol=1e-7)


def statistics_by_name(model, family, **ranks) -> dict[str, torch.Tensor]:
    everything = Needs(gradients=True, last_tokens=True)
    plain = collect(model, family, batch_size=2, needs=everything, **ranks)
    sensitive = collect(model, family, batch_size=2, sensitivity=True, **ranks)
    found = {name: value for name, value in vars(plain).items() if isinstance(value, torch.Tensor)}
    return found | {"sensitive": sensitive.square_sum_LC, "weight": sensitive.channel_weight_L}


def _collect_on_ranks(rank: int, ranks: int, folder: str, family: str, out: str) -> None:
    model = load_sharded(folder, init_device_mesh("cpu", (ranks,)), torch.float32)
    local = sum(p.to_local().numel() for p in model.parameters())
    model.requires_grad_(False)
    found = statistics_by_name(model, family, rank=rank, ranks=ranks)
    logits_BTV = model(input_ids=torch.arange(20)[None], use_cache=False).logits
    if rank == 0:
        torch.save({**found, "logits": logits_BTV.detach(), "local": local}, out)


@pytest.mark.parametrize(("family", "ranks"), [("qwen2", 2), ("llama", 4), ("gemma3_text", 2)])
def test_any_number_of_ranks_gives_the_same_statistics(family, ranks, make_checkpoint, tmp_path):
    folder = make_checkpoint(family)
    run_ranks(_collect_on_ranks, ranks, folder, family, str(tmp_path / "out.pt"))
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    for name, expected in statistics_by_name(model, family).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: name + text)
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


def test_rows_that_fill_a_batch_up_attend_to_something_and_count_nothing():
    few = sequences()[:3]
    batch = next(batches_for_rank(few, 2, 1, 2, 0, PROMPT_WEIGHT))  # of three sequences, rank 1 of 2 gets one
    assert batch.is_sequence_B.tolist() == [True, False]
    assert batch.mask_BT[1].sum() == 1
    assert not batch.weight_BT[1].any() and not batch.writes_BT[1].any()
    assert torch.equal(batch.mask_BT[0].sum(), (batch.weight_BT[0] > 0).sum())
