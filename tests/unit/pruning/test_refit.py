"""Refitting kept weights to the original's stream, against the same by hand: whole models, rows kept, least squares."""

import copy

import pytest
import torch
from test_engine import CPU, criterion_of, plan_of, policy_of, sequences
from torch import nn

from ptl_rl.families import FAMILIES
from ptl_rl.pruning import engine
from ptl_rl.pruning.compensate.algebra import least_squares
from ptl_rl.pruning.compensate.blockwise import block_by_block
from ptl_rl.pruning.compensate.refit import SMALLEST_GAIN, refit
from ptl_rl.pruning.masking import skipped
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.calibration import batches_for_rank
from ptl_rl.pruning.score.moments import SecondMoments

CUTS = [engine.Removal(18, 0), engine.Removal(0, 2), engine.Removal(18, 1)]


def plan_for(prunable: engine.PrunableModel, cut: engine.Removal, ids: list[int] | None = None) -> PruningPlan:
    ids = ids or {0: [], 1: [2], 2: [2, 1]}[cut.layers]
    return plan_of(prunable, criterion_of(layers="explicit", layer_ids=ids) if ids else criterion_of(), cut)


class ByHand:
    """One sequence at a time through whole models; every row is kept."""

    def __init__(self, prunable: engine.PrunableModel, plan: PruningPlan) -> None:
        self.family, self.plan = prunable.family, plan
        self.original = prunable.model
        self.cut = copy.deepcopy(prunable.model)
        self.weights: dict[tuple[int, str], torch.Tensor] = {}

    def rows(self, model: nn.Module, gone: list[int], layer: int) -> dict[str, torch.Tensor]:
        """Of block ``layer``: stream in and out, inputs and outputs of both projections, weights of positions."""
        family, block = self.family, model.model.layers[layer]
        found: dict[str, list[torch.Tensor]] = {}
        seen: dict[str, torch.Tensor] = {}
        taps = [(block.self_attn.o_proj, "heads", "attended"), (block.mlp.down_proj, "hidden", "fed")]
        taps += [(block, "in", "out")]
        if family.attention_norm:
            taps += [(block.post_attention_layernorm, "", "attention")]
        handles = [
            module.register_forward_hook(
                lambda _m, x, out, i=i, o=o: seen.update(
                    {i: x[0][0], o: (out[0] if isinstance(out, tuple) else out)[0]}
                )
            )
            for module, i, o in taps
        ]
        for sequence in sequences():
            with torch.no_grad(), skipped(model, family, gone):
                model(input_ids=torch.tensor([sequence.ids]), use_cache=False)
            reading = max(sequence.prompt_tokens - 1, 0)
            seen["weight"] = torch.tensor([0.3] * reading + [1.0] * (len(sequence.ids) - reading))
            seen.setdefault("attention", seen["attended"])
            if not family.attention_norm:
                seen["attention"] = seen["attended"]
            for name, value in seen.items():
                found.setdefault(name, []).append(value.double())
        for handle in handles:
            handle.remove()
        return {name: torch.cat(values) for name, values in found.items()}

    def refit(self, layer: int, before: list[int], behind: int, diverged: bool) -> None:
        """``before``: blocks gone before it; ``behind``: the original's last block whose output it is to give."""
        plan, family = self.plan, self.family
        original, block = self.rows(self.original, [], layer), self.cut.model.layers[layer]
        if diverged:
            cut = self.rows(self.cut, before, layer)
            error = original["in"] + original["attention"] - cut["in"] - cut["attention"]
            norm = block.post_attention_layernorm if family.attention_norm else None
            change = self.regression(cut["heads"], cut["attended"], norm, error, cut["weight"], plan.stream_ridge)
            block.self_attn.o_proj.weight.data += change.float()
            self.weights[layer, "o_proj"] = block.self_attn.o_proj.weight.data.clone()
        cut, target = self.rows(self.cut, before, layer), self.rows(self.original, [], behind)["out"]
        keep = plan.keep_channels[layer]
        norm = block.post_feedforward_layernorm if family.output_norm else None
        weight_HC = block.mlp.down_proj.weight.data.double()
        change = self.regression(
            cut["hidden"][:, keep], cut["fed"], norm, target - cut["out"], cut["weight"], plan.stream_ridge
        )
        new_HK = weight_HC[:, keep] + change
        if len(keep) < weight_HC.shape[1]:
            new_HK += self.absorbed(weight_HC, cut["hidden"], cut["fed"], norm, cut["weight"], keep)
        self.weights[layer, "down_proj"] = new_HK.float()
        whole = torch.zeros_like(block.mlp.down_proj.weight.data)
        whole[:, keep] = new_HK.float()
        block.mlp.down_proj.weight.data = whole

    @staticmethod
    def scaled(x_NX: torch.Tensor, output_NH: torch.Tensor, norm: nn.Module | None, weight_N: torch.Tensor):
        if norm is not None:
            x_NX = x_NX * (output_NH.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        return x_NX * weight_N.sqrt()[:, None]

    def regression(self, x_NX, output_NH, norm, error_NH, weight_N, ridge: float) -> torch.Tensor:
        """(H, X) change of the projection."""
        x_NX = self.scaled(x_NX, output_NH, norm, weight_N)
        inputs = x_NX.shape[1]
        root = (ridge * x_NX.square().sum(0).median()).sqrt()
        rows = torch.cat([x_NX, root * torch.eye(inputs, dtype=torch.float64)])
        wanted = torch.cat([error_NH * weight_N.sqrt()[:, None], torch.zeros(inputs, error_NH.shape[1])])
        change = torch.linalg.lstsq(rows, wanted.double()).solution.T
        if norm is None:
            return change
        gain_H = 1 + norm.weight.data.double()
        least = SMALLEST_GAIN * gain_H.square().mean().sqrt()
        gain_H = torch.where(gain_H.abs() < least, torch.where(gain_H < 0, -least, least), gain_H)
        return change / gain_H[:, None]

    def absorbed(self, weight_HC, hidden_NC, output_NH, norm, weight_N, keep: list[int]) -> torch.Tensor:
        """(H, K): what the kept columns take over from the removed ones, for one ridge on the changes."""
        x_NC = self.scaled(hidden_NC, output_NH, norm, weight_N)
        gone = [channel for channel in range(weight_HC.shape[1]) if channel not in keep]
        root = (self.plan.ridge * x_NC.square().sum(0).mean()).sqrt()
        rows = torch.cat([x_NC[:, keep], root * torch.eye(len(keep), dtype=torch.float64)])
        wanted = torch.cat([x_NC[:, gone] @ weight_HC[:, gone].T, torch.zeros(len(keep), len(weight_HC))])
        return torch.linalg.lstsq(rows, wanted.double()).solution.T


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_weight_is_the_regression_by_hand(family, cut, make_checkpoint):
    prunable = policy_of(make_checkpoint(family, num_hidden_layers=5), family)
    for block in prunable.model.model.layers:
        if prunable.family.output_norm:  # of both signs and all sizes, with the offset
            for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
                norm.weight.data.normal_(-0.3, 0.7, generator=torch.Generator().manual_seed(0))
    prunable.weight = lambda layer, name, rows=slice(None): prunable.model.get_submodule(
        prunable.family.projection(layer, name)
    ).weight[rows]
    plan, by_hand = plan_for(prunable, cut), None
    found: dict[tuple[int, str], torch.Tensor] = {}
    losses = refit(prunable, plan, sequences(), lambda layer, name, weight: found.update({(layer, name): weight}))
    by_hand = ByHand(prunable, plan)
    diverged = False
    for layer in plan.keep_layers:
        behind = layer
        while behind + 1 in plan.layer_order:
            behind += 1
        if cut.channels or diverged or behind > layer:
            by_hand.refit(layer, plan.layer_order, behind, diverged)
            diverged = True
    assert found.keys() == by_hand.weights.keys()
    assert len(found) == {(18, 0): 9, (0, 2): 5, (18, 1): 7}[cut.channels, cut.layers]
    for key, weight in by_hand.weights.items():
        torch.testing.assert_close(found[key], weight, rtol=2e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}")
    # What it is for: behind the last block the stream is nearer to the original's than without.
    original = by_hand.rows(prunable.model, [], 4)
    refitted, plain = by_hand.rows(by_hand.cut, plan.layer_order, 4), None
    untouched = copy.deepcopy(prunable.model)
    for layer in plan.keep_layers:
        keep = plan.keep_channels[layer]
        mask = torch.zeros(48)
        mask[keep] = 1
        untouched.model.layers[layer].mlp.down_proj.weight.data *= mask
    plain = by_hand.rows(untouched, plan.layer_order, 4)

    def lost(rows: dict[str, torch.Tensor]) -> float:
        share_N = (rows["out"] - original["out"]).square().sum(-1) / original["out"].square().sum(-1)
        return float((share_N * rows["weight"]).sum() / rows["weight"].sum())

    assert losses.stream == pytest.approx(lost(refitted), rel=1e-2)
    assert losses.stream < 0.9 * lost(plain)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_one_at_a_time_are_the_model(family, make_checkpoint):
    prunable = policy_of(make_checkpoint(family, num_hidden_layers=4), family)
    model = prunable.model
    blocks_before = list(model.model.layers)
    batches = list(batches_for_rank(sequences(), 4, 0, 1, 0, 0.3))
    for batch in batches:
        with torch.no_grad():
            expected = model.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)
        with block_by_block(model, prunable.family, batches[0]) as blocks:
            stream = [blocks.embed(batch)]
            for layer in range(4):
                blocks.visit(layer, batch, lambda run, stream=stream: stream.append(run(stream[-1]).out_BTH))
        normed_BTH = model.model.norm(stream[-1])
        real = batch.mask_BT.bool()
        torch.testing.assert_close(normed_BTH[real], expected.last_hidden_state[real])
        assert list(model.model.layers) == blocks_before
    assert model(input_ids=batches[0].ids_BT).logits.shape[-1] == model.config.vocab_size  # the head is back


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sensitivity_weighs_positions(family, make_checkpoint):
    prunable = policy_of(make_checkpoint(family), family)
    plan = plan_for(prunable, engine.Removal(18, 0))
    found: dict[bool, dict] = {True: {}, False: {}}
    for sensitivity, new in found.items():
        refit(prunable, plan, sequences(), lambda *key, new=new: new.update({key[:2]: key[2]}), sensitivity=sensitivity)
        # Before the first block nothing has gone wrong yet, so its columns only absorb.
        moments = SecondMoments(prunable.layers, prunable.channels, CPU, [0])
        prunable.read(sequences(), [moments], sensitivity)
        fit = least_squares(prunable.weight(0, "down_proj"), moments.take(0), plan.keep_channels[0], plan.ridge)
        torch.testing.assert_close(new[0, "down_proj"], fit.weight_HK, rtol=1e-3, atol=1e-5)
    for key, weight in found[True].items():
        assert (weight - found[False][key]).abs().max() > 1e-5


@pytest.mark.parametrize(("family", "sizes"), [("llama", {"mlp_bias": True}), ("gemma2", {})])
def test_lost_shares_are_of_what_the_channels_give(family, sizes, make_checkpoint):
    prunable = policy_of(make_checkpoint(family, num_hidden_layers=1, **sizes), family)
    if sizes:  # which no cut changes
        prunable.model.model.layers[0].mlp.down_proj.bias.data.normal_(0, 5)
    plan = plan_for(prunable, engine.Removal(18, 0))
    losses = refit(prunable, plan, sequences(), lambda *_: None)
    moments = SecondMoments(1, prunable.channels, CPU)
    prunable.read(sequences(), [moments])
    moment_CC, weight_HC = moments.take(0).double(), prunable.weight(0, "down_proj").double()
    total = float(((weight_HC @ moment_CC) * weight_HC).sum())
    fit = least_squares(weight_HC, moment_CC, plan.keep_channels[0], plan.ridge)
    assert losses.channels_plain == pytest.approx(fit.lost_plain / total, rel=1e-4)
    assert losses.channels == pytest.approx(fit.lost / total, rel=1e-3)
