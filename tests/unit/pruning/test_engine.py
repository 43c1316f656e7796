"""Scoring and compensation as a whole: blocks one at a time, regressions, and the same on any number of ranks."""

from pathlib import Path

import pytest
import torch
from process_ranks import run_ranks
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl_rl.checkpoints.sharded import load_sharded
from ptl_rl.config import CHANNEL_CRITERIA, ContrastConfig, CriterionConfig, SourceConfig
from ptl_rl.data.encoding import Sequence
from ptl_rl.families import FAMILIES
from ptl_rl.pruning import engine
from ptl_rl.pruning.choose import blocks
from ptl_rl.pruning.choose.absorption import absorb, lookup
from ptl_rl.pruning.choose.choice import make_plan
from ptl_rl.pruning.compensate import block_moments
from ptl_rl.pruning.masking import masked, skipped
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.calibration import batches_for_rank
from ptl_rl.pruning.score.criteria import CHANNEL_CRITERIA as CRITERIA
from ptl_rl.pruning.score.statistics import Collector, Needs
from ptl_rl.pruning.score.streaming import CalibrationError, mean_loss, stream
from ptl_rl.pruning.slice.slicing import MissingWeightError, load_new_weight, save_new_weight, slice_checkpoint
from ptl_rl.pruning.slice.verify import logit_difference

CPU = torch.device("cpu")
CONTRAST = ContrastConfig(data=SourceConfig(path="unused"))


def sequences(seed: int = 0) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [25, 19, 37, 23, 40, 32, 28, 31]
    return [Sequence(torch.randint(0, 290, (n,), generator=generator).tolist(), n // 2) for n in lengths]


def policy_of(folder: Path, family: str, model=None, batch_size: int = 2) -> engine.PrunableModel:
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    return engine.PrunableModel(model, FAMILIES[family], folder, CPU, batch_size, 0, 0.3)


def criterion_of(channels: str = "obs", **fields) -> CriterionConfig:
    if channels == "ptl_reference":
        fields.setdefault("contrast", CONTRAST)
    return CriterionConfig(channels=channels, **fields)


def plan_of(prunable: engine.PrunableModel, criterion: CriterionConfig, cut: engine.Removal) -> PruningPlan:
    scores = engine.score(prunable, criterion, cut, sequences(), general=sequences(1) if criterion.contrast else [])
    return make_plan(
        scores,
        criterion,
        remove_channels=cut.channels,
        alignment=1,
        subset_hash="",
        source=prunable.source,
    )


@pytest.mark.parametrize("channels", CHANNEL_CRITERIA)
def test_every_criterion_scores_and_plans(channels, make_checkpoint):
    prunable = policy_of(make_checkpoint("llama"), "llama")
    plan = plan_of(prunable, criterion_of(channels), engine.Removal(channels=18, layers=0))
    assert plan.intermediate_size == 30 and plan.keep_layers == [0, 1, 2]
    # Equal to the rule by hand: what is kept are the largest of what the criterion says, were all statistics there.
    if channels in CRITERIA:
        everything = Needs(gradients=channels == "taylor", last_tokens=channels == "ptl_reference")
        collector = Collector(prunable.model, prunable.family, 48, CPU, everything)
        chosen = sequences()[:10]
        prunable.read(chosen, [collector])
        statistics = collector.reduce(remove_channels=18)
        if channels == "ptl_reference":
            general = Collector(prunable.model, prunable.family, 48, CPU, everything)
            prunable.read(sequences(1), [general])
            statistics.general = general.reduce()
        for kept, importance_C in zip(plan.keep_channels, CRITERIA[channels](statistics), strict=True):
            assert kept == sorted(sorted(range(48), key=lambda j, row=importance_C: -float(row[j]))[:30])


def test_progress_counts_every_batch(make_checkpoint):
    prunable = policy_of(make_checkpoint("llama"), "llama")
    for criterion in (
        criterion_of("activation", layers="leave_one_out", layer_sequences=4, contrast=CONTRAST),
        criterion_of("obs", layers="cosine"),
    ):
        read = []
        prunable.progress = lambda read=read: read.append(1)
        cut, general = engine.Removal(8, 2), sequences(1) if criterion.contrast else []
        engine.score(prunable, criterion, cut, sequences(), general=general)
        assert len(read) == engine.batches_to_read(prunable, criterion, cut, sequences(), general)


def test_few_matrices_at_once_give_the_same(make_checkpoint, tmp_path):
    folder, cut = make_checkpoint("llama", num_hidden_layers=5), engine.Removal(18, 1)
    found = []
    for at_once in (None, 2):
        prunable, read = policy_of(folder, "llama"), []
        prunable.progress = lambda read=read: read.append(1)
        prunable.moments_gib = at_once and at_once * 1.2 * 48**2 * 4 / 2**30
        criterion = criterion_of(layers="explicit", layer_ids=[3])
        plan = plan_of(prunable, criterion, cut)
        new_weights = tmp_path / str(at_once)
        engine.compensate(prunable, plan, sequences(), new_weights)
        expected = engine.batches_to_read(prunable, criterion, cut, sequences(), [])
        assert len(read) == expected + engine.batches_to_compensate(prunable, 1, sequences())
        assert len(read) == prunable.rounds(sequences()) * ((1 if at_once is None else 3) + 5 + 2 * 4)
        found.append((plan.keep_channels, {file.name: load_file(file)["weight"] for file in new_weights.iterdir()}))
    (kept, weights), (kept_in_groups, weights_in_groups) = found
    assert kept == kept_in_groups and weights.keys() == weights_in_groups.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weights_in_groups[name], weight, rtol=1e-4, atol=1e-6)


def test_less_memory_than_one_matrix_takes_is_refused(make_checkpoint):
    prunable = policy_of(make_checkpoint("llama"), "llama")
    prunable.moments_gib = 1e-9
    with pytest.raises(CalibrationError, match=r"moments_gib is 1e-09, but the matrix of one block of 48 channels"):
        plan_of(prunable, criterion_of(), engine.Removal(18, 0))


class TestBlocksThatGo:
    def test_greedy_measures_again_without_those_before(self):
        asked = []

        def importance(gone):
            asked.append(list(gone))
            # Once block 2 is gone, block 0 cannot be done without.
            return torch.tensor([1.5, 2.0, 1.0, 3.0]) if not gone else torch.tensor([9.0, 2.0, 0.0, 3.0])

        assert blocks.greedy(importance, 2) == [2, 1]
        assert asked == [[], [2]]

    def test_a_model_that_breaks_without_a_block_needs_it(self):
        assert blocks.greedy(lambda gone: torch.tensor([torch.nan, 2.0, 1.0]), 1) == [2]

    def test_explicit_ids_are_the_original_models(self):
        assert blocks.explicit([5, 2, 7], 0, 2) == [5, 2]
        assert blocks.explicit([5, 2, 7], 1, 1) == [2]
        assert blocks.explicit([5, 2, 7], 2, 1) == [5]  # two before it are gone

    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    def test_leave_one_out_is_the_loss_without(self, family, make_checkpoint):
        prunable = policy_of(make_checkpoint(family, num_hidden_layers=4), family)
        order = plan_of(
            prunable, criterion_of(layers="leave_one_out", compensate="none"), engine.Removal(0, 2)
        ).layer_order
        gone: list[int] = []
        for found in order:
            losses = {}
            for layer in {0, 1, 2, 3} - set(gone):
                with skipped(prunable.model, prunable.family, [*gone, layer]):
                    batches = batches_for_rank(sequences(), 8, 0, 1, 0, 0.3)
                    losses[layer] = mean_loss(prunable.model, batches, CPU)
            assert found == min(losses, key=lambda layer: losses[layer])
            gone.append(found)

    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    def test_leave_one_out_is_the_loss_once_the_block_before_has_taken_over(self, family, make_checkpoint):
        prunable = policy_of(make_checkpoint(family, num_hidden_layers=4), family)
        criterion = criterion_of(layers="leave_one_out")
        order = plan_of(prunable, criterion, engine.Removal(0, 2)).layer_order
        taken_over: dict[tuple[int, str], torch.Tensor] = {}
        for place, found in enumerate(order):
            losses, changes = {}, {}
            left = sorted({0, 1, 2, 3} - set(order[:place]))
            absorbed = absorb(prunable, order[:place], left, sequences(), criterion.stream_ridge, lookup(taken_over))
            for candidate in list(absorbed):
                changes[candidate.removed] = {**taken_over, **candidate.new}
                model = policy_of(prunable.source, family).model
                for (layer, name), weight in changes[candidate.removed].items():
                    model.get_submodule(prunable.family.projection(layer, name)).weight.data = weight
                with skipped(model, prunable.family, [*order[:place], candidate.removed]):
                    batches = batches_for_rank(sequences(), 8, 0, 1, 0, 0.3)
                    losses[candidate.removed] = mean_loss(model, batches, CPU)
            assert found == min(losses, key=lambda layer: losses[layer])
            taken_over = changes[found]

    def test_leave_one_out_judges_the_best_of_few_sequences_on_all(self, make_checkpoint):
        prunable, read = policy_of(make_checkpoint("llama", num_hidden_layers=6), "llama"), []
        prunable.progress = lambda: read.append(1)

        def losses(layers, judged):
            found = {}
            for layer in layers:
                with skipped(prunable.model, prunable.family, [layer]):
                    found[layer] = mean_loss(prunable.model, batches_for_rank(judged, 8, 0, 1, 0, 0.3), CPU)
            return sorted(found, key=lambda layer: found[layer])

        # Some sequence puts another block first than all of them do; the fourth or better of it is what all put first.
        few = next(
            n
            for n in range(1, len(sequences()))
            if losses(range(6), sequences()[:n])[0] != losses(range(6), sequences())[0]
        )
        finalists = losses(range(6), sequences()[:few])[:4]
        criterion = criterion_of("activation", layers="leave_one_out", compensate="none", layer_sequences=few)
        cut = engine.Removal(0, 1)
        assert plan_of(prunable, criterion, cut).layer_order == losses(finalists, sequences())[:1] != finalists[:1]
        assert len(read) == engine.batches_to_read(prunable, criterion, cut, sequences(), [])

    def test_few_regressions_at_once_give_the_same_order(self, make_checkpoint):
        folder = make_checkpoint("llama", num_hidden_layers=5)
        orders, criterion = [], criterion_of("activation", layers="leave_one_out")
        for gib in (None, 1e-9):
            prunable, read = policy_of(folder, "llama"), []
            prunable.moments_gib = gib
            prunable.progress = lambda read=read: read.append(1)
            cut = engine.Removal(0, 2)
            orders.append(plan_of(prunable, criterion, cut).layer_order)
            rounds = prunable.rounds(sequences())
            # Scores, then every candidate, and what those with a predecessor leave to it: together or one by one.
            assert len(read) == rounds * (1 + (5 + 1) + (4 + 1) if gib is None else 1 + (5 + 4) + (4 + 3))
            assert len(read) == engine.batches_to_read(prunable, criterion, cut, sequences(), [])
        assert orders[0] == orders[1]

    @pytest.mark.parametrize("layers", ["block_influence", "cosine"])
    def test_measured_influence_of_the_second_is_without_the_first(self, layers, make_checkpoint):
        folder = make_checkpoint("qwen2", num_hidden_layers=4)
        criterion = criterion_of("activation", layers=layers)
        both = plan_of(policy_of(folder, "qwen2"), criterion, engine.Removal(0, 2)).layer_order
        first = plan_of(policy_of(folder, "qwen2"), criterion, engine.Removal(0, 1)).layer_order
        assert both[:1] == first
        shorter = folder.with_name(folder.name + "-shorter")
        slice_checkpoint(folder, plan_of(policy_of(folder, "qwen2"), criterion, engine.Removal(0, 1)), shorter)
        then = plan_of(policy_of(shorter, "qwen2"), criterion, engine.Removal(0, 1)).layer_order[0]
        assert both[1] == then + (then >= first[0])


def contribution(model, removed: int, predecessor: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weighted: what goes into the predecessor's two projections, and what the removed block adds."""
    x_parts, y_parts = [], []
    seen: dict[str, torch.Tensor] = {}
    layers = model.model.layers
    handles = [
        layers[predecessor].self_attn.o_proj.register_forward_pre_hook(lambda _m, x: seen.__setitem__("o", x[0][0])),
        layers[predecessor].mlp.down_proj.register_forward_pre_hook(lambda _m, x: seen.__setitem__("d", x[0][0])),
        layers[removed].register_forward_hook(
            lambda _m, x, out: seen.__setitem__("y", ((out[0] if isinstance(out, tuple) else out) - x[0])[0])
        ),
    ]
    for sequence in sequences():
        reading = max(sequence.prompt_tokens - 1, 0)
        weight_N = torch.tensor([0.3] * reading + [1.0] * (len(sequence.ids) - reading)).sqrt()[:, None]
        model(input_ids=torch.tensor([sequence.ids]), use_cache=False)
        x_parts.append(torch.cat([seen["o"], seen["d"]], dim=1) * weight_N)
        y_parts.append(seen["y"] * weight_N)
    for handle in handles:
        handle.remove()
    return torch.cat(x_parts).double(), torch.cat(y_parts).double(), torch.cat(y_parts).square().sum().double()


@pytest.mark.parametrize("family", [name for name in sorted(FAMILIES) if FAMILIES[name].output_norm is None])
def test_block_compensation_is_the_regression(family, make_checkpoint):
    folder = make_checkpoint(family)
    prunable = policy_of(folder, family)
    moments = block_moments.BlockMoments(removed=2, predecessor=1)
    stream(prunable.model, prunable.family, prunable.batches(sequences()), [moments], CPU)
    gain_o, gain_down = moments.solve(32, 1e-9)
    x_NX, y_NH, total = contribution(prunable.model, 2, 1)
    expected_XH = torch.linalg.lstsq(x_NX, y_NH).solution
    residual = (x_NX @ torch.cat([gain_o, gain_down], dim=1).T.double() - y_NH).square().sum() / total
    best = (x_NX @ expected_XH - y_NH).square().sum() / total
    assert float(residual) == pytest.approx(float(best), rel=1e-3)
    assert residual < 0.9  # of 1, which is what removing it plainly loses


@pytest.mark.parametrize("family", [name for name in sorted(FAMILIES) if FAMILIES[name].output_norm is not None])
def test_normed_block_compensation_is_the_regression(family, make_checkpoint):
    folder = make_checkpoint(family)
    prunable = policy_of(folder, family)
    block = prunable.model.model.layers[1]
    norm = block.post_feedforward_layernorm
    norm.weight.data.normal_(0, 0.7, generator=torch.Generator().manual_seed(0))  # of both signs, with the offset
    norm_H = 1 + norm.weight.data
    moments = block_moments.NormedBlockMoments(2, 1, norm_H, norm.eps)
    stream(prunable.model, prunable.family, prunable.batches(sequences()), [moments], CPU)
    down_HC, new_norm_H = moments.solve(block.mlp.down_proj.weight, 1e-9)
    # Again by the definition, from rows that are collected apart.
    rows: dict[str, list] = {"h": [], "y": [], "w": []}
    seen: dict[str, torch.Tensor] = {}
    block.mlp.down_proj.register_forward_hook(lambda _m, x, out: seen.update(h=x[0][0], d=out[0]))
    prunable.model.model.layers[2].register_forward_hook(
        lambda _m, x, out: seen.update(y=((out[0] if isinstance(out, tuple) else out) - x[0])[0])
    )
    kept = []
    for sequence in sequences():
        reading = max(sequence.prompt_tokens - 1, 0)
        rows["w"].append(torch.tensor([0.3] * reading + [1.0] * (len(sequence.ids) - reading)))
        prunable.model(input_ids=torch.tensor([sequence.ids]), use_cache=False)
        root_N1 = (seen["d"].square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        rows["h"].append(seen["h"] * root_N1)
        rows["y"].append(seen["y"])
        kept.append(seen["d"] * root_N1 * norm_H)
    x_NC, y_NH, m_NH = torch.cat(rows["h"]).double(), torch.cat(rows["y"]).double(), torch.cat(kept).double()
    weight_N1 = torch.cat(rows["w"]).double()[:, None]
    gain_CH = torch.linalg.lstsq(x_NC * weight_N1.sqrt(), y_NH * weight_N1.sqrt()).solution
    size_H = ((m_NH + y_NH).square() * weight_N1).sum(0).div(weight_N1.sum()).sqrt()
    torch.testing.assert_close(new_norm_H.double(), torch.where(norm_H < 0, -size_H, size_H), rtol=1e-4, atol=1e-7)
    wanted_HC = (norm_H.double()[:, None] * block.mlp.down_proj.weight.double() + gain_CH.T) / new_norm_H.double()[
        :, None
    ]
    torch.testing.assert_close(down_HC.double(), wanted_HC, rtol=1e-2, atol=1e-3)
    # And what it is for: the normed output is nearer to the sum of both contributions than the block's own is.
    raw_NH = x_NC @ down_HC.T.double()
    found_NH = raw_NH * (raw_NH.square().mean(-1, keepdim=True)).rsqrt() * new_norm_H
    apart = ((found_NH - m_NH - y_NH).square() * weight_N1).sum() / (y_NH.square() * weight_N1).sum()
    assert float(apart) < 0.9  # of 1, which is what removing it plainly loses


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("cut", [engine.Removal(18, 0), engine.Removal(0, 2), engine.Removal(18, 1)], ids=str)
def test_compensated_export_computes_what_the_reference_computes(family, cut, make_checkpoint, tmp_path):
    folder = make_checkpoint(family, num_hidden_layers=4)
    prunable = policy_of(folder, family)
    # Neighbours: the block before them follows the original's stream behind both.
    ids = {0: [], 1: [2], 2: [2, 1]}[cut.layers]
    criterion = criterion_of(layers="explicit", layer_ids=ids) if ids else criterion_of()
    plan = plan_of(prunable, criterion, cut)
    new_weights, out = tmp_path / "new", tmp_path / "sliced"
    losses = engine.compensate(prunable, plan, sequences(), new_weights)
    slice_checkpoint(folder, plan, out, new_weights=new_weights)
    ids_BT = torch.randint(0, 290, (2, 40))
    sliced = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        with masked(prunable.model, prunable.family, plan):
            plain_BTV = prunable.model(input_ids=ids_BT).logits
        with masked(
            prunable.model, prunable.family, plan, lambda layer, name: load_new_weight(new_weights, layer, name)
        ):
            expected_BTV = prunable.model(input_ids=ids_BT).logits
        actual_BTV = sliced(input_ids=ids_BT).logits
    torch.testing.assert_close(actual_BTV, expected_BTV, atol=1e-5, rtol=1e-5)
    assert (actual_BTV - plain_BTV).abs().max() > 1e-4
    if cut.channels:
        assert losses.channels < losses.channels_plain < 1
    assert losses.stream is not None and 0 < losses.stream < 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["How many apples are left?", "Tom has 3 boxes."]

    def load(path: Path):
        return AutoModelForCausalLM.from_pretrained(path).eval()

    check = (load, prunable.family, folder, plan, out, tokenizer, texts)
    assert logit_difference(*check, new_weights) < 1e-5
    # The check can fail: without the new weights, and with another block's.
    assert logit_difference(*check) > 1e-4
    first, other = [plan.keep_layers[index] for index in (0, -1)] if cut.channels else (0, plan.keep_layers[-1])
    wrong = load_new_weight(new_weights, other, "down_proj")
    if wrong is not None and first != other:
        save_new_weight(new_weights, first, "down_proj", wrong)
        assert logit_difference(*check, new_weights) > 1e-4


def test_a_missing_new_weight_is_refused(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    prunable = policy_of(folder, "llama")
    plan = plan_of(prunable, criterion_of(), engine.Removal(18, 0))
    engine.compensate(prunable, plan, sequences(), tmp_path / "new")
    (tmp_path / "new" / "00001.down_proj.safetensors").unlink()
    with pytest.raises(MissingWeightError, match="the weight of block 1 is missing"):
        slice_checkpoint(folder, plan, tmp_path / "out", new_weights=tmp_path / "new")


def test_compensating_anew_forgets_what_was_there(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    prunable, found = policy_of(folder, "llama"), []
    plan = plan_of(prunable, criterion_of(), engine.Removal(18, 0))
    for name in ("used", "fresh"):
        if name == "used":
            ids = criterion_of(layers="explicit", layer_ids=[2])
            engine.compensate(prunable, plan_of(prunable, ids, engine.Removal(0, 1)), sequences(), tmp_path / name)
        engine.compensate(prunable, plan, sequences(), tmp_path / name)
        found.append({path.name: load_file(path)["weight"] for path in (tmp_path / name).iterdir()})
    assert found[0].keys() == found[1].keys()
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name])


CUTS = {"obs": engine.Removal(18, 0), "taylor": engine.Removal(18, 2), "ptl_reference": engine.Removal(18, 0)}
LAYERS = {"obs": "block_influence", "taylor": "leave_one_out", "ptl_reference": "cosine"}


def _plans_and_weights(prunable: engine.PrunableModel, out: Path) -> None:
    for name, cut in CUTS.items():
        plan = plan_of(prunable, criterion_of(name, layers=LAYERS[name]), cut)
        losses = engine.compensate(prunable, plan, sequences(), out / name)
        if prunable.rank == 0:
            plan.save(out / f"{name}.json")
        if prunable.rank == prunable.ranks - 1:  # every rank knows them
            (out / f"{name}.txt").write_text(" ".join(str(value) for value in vars(losses).values()))


def _engine_on_ranks(rank: int, ranks: int, folder: Path, family: str, out: Path) -> None:
    model = load_sharded(folder, init_device_mesh("cpu", (ranks,)), torch.float32, attention="eager")
    # Sixteen sequences' worth of rows in all, so that batches are shared out differently by every number of ranks.
    _plans_and_weights(policy_of(folder, family, model, batch_size=2), out)


@pytest.mark.parametrize(("family", "ranks"), [("llama", 2), ("gemma2", 3), ("qwen2", 4)])
def test_any_number_of_ranks_gives_the_same_plans_and_weights(family, ranks, make_checkpoint, tmp_path):
    # No number of ranks divides the hidden units, which the solves share out.
    sizes = {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    folder = make_checkpoint(family, num_hidden_layers=4, **sizes)
    one, several = tmp_path / "one", tmp_path / "several"
    for path in (one, several):
        path.mkdir()
    _plans_and_weights(policy_of(folder, family), one)
    run_ranks(_engine_on_ranks, ranks, folder, family, several)
    for name in CUTS:
        assert (several / f"{name}.json").read_text() == (one / f"{name}.json").read_text()
        expected, found = (
            [float(v) for v in (p / f"{name}.txt").read_text().split() if v != "None"] for p in (one, several)
        )
        assert found == pytest.approx(expected, rel=1e-3)
        files = sorted(path.name for path in (one / name).iterdir())
        assert files and files == sorted(path.name for path in (several / name).iterdir())
        for file in files:
            layer, projection, _ = file.split(".")
            weights = [load_new_weight(p / name, int(layer), projection) for p in (one, several)]
            torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)
