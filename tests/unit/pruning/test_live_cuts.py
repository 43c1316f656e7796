"""Cuts of a live model are those of a checkpoint's stages: plans, new weights and what the model then computes."""

import functools
from pathlib import Path

import pytest
import torch
from plans import plan_keeping
from process_ranks import run_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from ptl_rl.config import CriterionConfig
from ptl_rl.data.encoding import Sequence
from ptl_rl.families import FAMILIES
from ptl_rl.pruning import engine
from ptl_rl.pruning import live as live_cuts
from ptl_rl.pruning.choose.choice import make_plan
from ptl_rl.pruning.live import (
    LiveModel,
    NoCutFits,
    blocks_after,
    cut_live,
    rollout_sequences,
    standing_after,
    whole_plan,
)
from ptl_rl.pruning.masking import only_blocks
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.calibration import batches_for_rank
from ptl_rl.pruning.score.streaming import inputs_of, negative_log_likelihood
from ptl_rl.pruning.slice.in_place import cut_in_place
from ptl_rl.pruning.slice.slicing import slice_checkpoint

CPU = torch.device("cpu")
CUTS = ((18, 1), (11, 0))
"""Channels of 48 and blocks of 3 that go, one cut after the other."""


def sequences(seed: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [25, 19, 37, 23, 40, 32, 28, 31]
    return [Sequence(torch.randint(0, 290, (n,), generator=generator).tolist(), n // 2, 1 + n % 3) for n in lengths]


def criterion_of(channels: str) -> CriterionConfig:
    return CriterionConfig(channels=channels)


def kept_by(plans: list[PruningPlan]) -> list[tuple]:
    return [(plan.keep_channels, plan.keep_layers, plan.layer_order) for plan in plans]


def by_stages(folder: Path, family: str, channels: str, sensitivity: bool, out: Path, cuts: tuple) -> tuple[list, Path]:
    """What cycles without recovery make: the channels and blocks that each keeps, and the checkpoint."""
    plans: list[PruningPlan] = []
    for number, (remove, layers) in enumerate(cuts):
        model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        prunable = engine.PrunableModel(model, FAMILIES[family], folder, CPU, 2, 0, 0.3)
        criterion, read = criterion_of(channels), sequences(number)
        scores = engine.score(
            prunable, criterion, engine.Removal(remove, layers), read, general=[], sensitivity=sensitivity, seed=number
        )
        plan = make_plan(scores, criterion, remove_channels=remove, alignment=1, subset_hash="", source=folder)
        new_weights = out / f"new-{number}"
        engine.compensate(prunable, plan, read, new_weights, sensitivity=sensitivity)
        slice_checkpoint(folder, plan, out / f"sliced-{number}", new_weights=new_weights)
        plans.append(plan)
        folder = out / f"sliced-{number}"
    return kept_by(plans), folder


def check(
    rank: int,
    ranks: int,
    folder: Path,
    family: str,
    channels: str,
    sensitivity: bool,
    out: Path,
    cuts: tuple,
    expected: tuple,
) -> None:
    kept, sliced = expected
    model = AutoModelForCausalLM.from_pretrained(folder)
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for block in model.get_submodule(FAMILIES[family].layers):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    model.eval()
    plans: list[PruningPlan] = []
    for number, (remove, layers) in enumerate(cuts):
        live = LiveModel(model, FAMILIES[family], folder, CPU, 2, 0, 0.3)
        found = cut_live(
            live,
            optimizer,
            criterion_of(channels),
            sequences(number),
            plans,
            remove_channels=remove,
            remove_layers=layers,
            alignment=1,
            sensitivity=sensitivity,
            seed=number,
        )
        assert found.loss_before > 0 and found.loss > 0 and found.losses.stream is not None
        assert found.score_seconds > 0 and found.compensate_seconds > 0
        assert all(parameter.grad is None for parameter in model.parameters())
        plans.append(found.plan)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options) if ranks > 1 else model.state_dict()
    if rank:
        return
    assert kept_by(plans) == kept
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(state)
    model.save_pretrained(out / "zeroed")
    slice_checkpoint(out / "zeroed", whole_plan(plans), out / "sliced")
    ids_BT = torch.randint(0, 290, (3, 20), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=ids_BT).logits
            for path in (sliced, out / "sliced", out / "zeroed", folder)
        ]
    scale = float(logits[0].abs().max())
    for found_BTV in logits[1:3]:
        assert torch.allclose(found_BTV, logits[0], atol=2e-4 * scale)
    assert not torch.allclose(logits[3], logits[0], atol=1e-2 * scale)


def compare(
    folder: Path, family: str, channels: str, sensitivity: bool, out: Path, ranks: int = 1, cuts: tuple = CUTS
) -> None:
    expected = by_stages(folder, family, channels, sensitivity, out / "stages", cuts)
    if ranks == 1:
        check(0, 1, folder, family, channels, sensitivity, out, cuts, expected)
    else:
        run_ranks(check, ranks, folder, family, channels, sensitivity, out, cuts, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_cuts_are_two_cycles(family, make_checkpoint, tmp_path):
    compare(make_checkpoint(family), family, "obs", False, tmp_path)


@pytest.mark.parametrize(("family", "ranks"), [("qwen2", 1), ("gemma2", 1), ("gemma2", 2), ("llama", 4)])
def test_blocks_go_from_a_model_that_has_lost_channels_and_a_block(family, ranks, make_checkpoint, tmp_path):
    """Each is tried out, and the others take over, where some channels and a block are zero already."""
    compare(make_checkpoint(family), family, "obs", False, tmp_path, ranks, cuts=((18, 0), (0, 1), (0, 1)))


def test_blocks_alone_go_one_after_the_other(make_checkpoint, tmp_path):
    compare(make_checkpoint("llama"), "llama", "obs", False, tmp_path, cuts=((0, 1), (0, 1)))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_blocks_keep_their_windows_when_they_are_numbered_anew(family, make_checkpoint):
    """Every other block reads four tokens back only; the first one adds nothing, and is left out."""
    model = AutoModelForCausalLM.from_pretrained(
        make_checkpoint(
            family, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        )
    ).eval()
    cut_in_place(model, FAMILIES[family], plan_keeping([list(range(48))] * 3, 48, [0]))
    ids_BT = torch.randint(0, 290, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected_BTV = model(input_ids=ids_BT, use_cache=False).logits
        with only_blocks(model, FAMILIES[family], [1, 2]):
            assert len(model.get_submodule(FAMILIES[family].layers)) == 2
            found_BTV = model(input_ids=ids_BT, use_cache=False).logits
        model.config.layer_types = model.config.layer_types[::-1][:1] + model.config.layer_types[:2]
        others_BTV = model(input_ids=ids_BT, use_cache=False).logits
    assert torch.allclose(found_BTV, expected_BTV, atol=1e-5 * float(expected_BTV.abs().max()))
    assert not torch.allclose(others_BTV, expected_BTV, atol=1e-3 * float(expected_BTV.abs().max()))


def test_blocks_that_the_recipe_names_go_whatever_went_before(make_checkpoint, tmp_path):
    """By ids of the original: 0, then 2, which is 1 in what is left; so, too, once the first cut is sliced off."""
    folder, criterion = make_checkpoint("llama"), CriterionConfig(layers="explicit", layer_ids=[0, 2])
    options = {"remove_channels": 0, "remove_layers": 1, "alignment": 1}
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    live, plans = LiveModel(model, FAMILIES["llama"], folder, CPU, 2, 0, 0.3), list[PruningPlan]()
    for number in range(2):
        plans.append(cut_live(live, None, criterion, sequences(number), plans, **options).plan)
    assert [plan.layer_order for plan in plans] == [[0], [1]] and blocks_after(plans) == [1]
    slice_checkpoint(folder, plans[0], tmp_path)
    sliced = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    live = LiveModel(sliced, FAMILIES["llama"], tmp_path, CPU, 2, 0, 0.3)
    assert cut_live(live, None, criterion, sequences(1), [], **options, layers_before=1).plan.layer_order == [1]


def cut_kept_whole(rank: int, ranks: int, folder: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.get_submodule(FAMILIES["llama"].layers):
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    plans: list[PruningPlan] = []
    for number, (channels, layers) in enumerate(((0, 1), (18, 0))):
        live = LiveModel(model, FAMILIES["llama"], folder, CPU, 2, 0, 0.3)
        options = {"remove_channels": channels, "remove_layers": layers, "alignment": 1}
        plans.append(cut_live(live, None, criterion_of("obs"), sequences(number), plans, **options).plan)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(([plan.model_dump() for plan in plans], dict(state)), out)


def test_blocks_that_stay_gathered_between_forward_passes_are_cut_alike(make_checkpoint, tmp_path):
    """As `reshard_after_forward: false` has them: what is written must reach the shards."""
    folder = make_checkpoint("llama")
    for ranks in (1, 2):
        run_ranks(cut_kept_whole, ranks, folder, tmp_path / f"{ranks}.pt")
    (plans, state), (plans_of_two, state_of_two) = (
        torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2)
    )
    assert plans == plans_of_two and len(plans[1]["keep_channels"]) == 2
    changed = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, value in state.items():
        assert torch.allclose(state_of_two[name], value, atol=1e-4), name
    assert not torch.equal(state["model.layers.0.mlp.down_proj.weight"], changed["model.layers.0.mlp.down_proj.weight"])


def test_by_another_criterion(make_checkpoint, tmp_path):
    compare(make_checkpoint("llama"), "llama", "wanda", False, tmp_path)


def test_with_sensitivity(make_checkpoint, tmp_path):
    compare(make_checkpoint("qwen2"), "qwen2", "obs", True, tmp_path)


def score_without_gradients(rank: int, ranks: int, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for block in model.get_submodule(FAMILIES["llama"].layers):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    live = LiveModel(model, FAMILIES["llama"], folder, CPU, 2, 0, 0.3)
    for channels, sensitivity in (("obs", True), ("taylor", False)):
        criterion = criterion_of(channels)
        engine.score(live, criterion, engine.Removal(9, 0), sequences(0), general=[], sensitivity=sensitivity)
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("ranks", [1, 2])
def test_scoring_by_gradients_gives_the_weights_none(ranks, make_checkpoint):
    """Of a model in training they would take as much memory as its weights, and a third of the time."""
    run_ranks(score_without_gradients, ranks, make_checkpoint("llama"))


@pytest.mark.parametrize(("family", "ranks"), [("gemma2", 2), ("llama", 4)])
def test_on_several_ranks(family, ranks, make_checkpoint, tmp_path):
    compare(make_checkpoint(family), family, "obs", ranks == 2, tmp_path, ranks)


READ = [*sequences(0), *sequences(1)]


@functools.cache
def learned(folder: Path) -> dict[str, torch.Tensor]:
    """Weights that know the sequences by heart, so that a cut does damage."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), steps=60)
    return model.state_dict()


def train(model, optimizer: torch.optim.Optimizer, steps: int) -> None:
    batch = next(iter(batches_for_rank(READ, len(READ), 0, 1, 0, 0.3)))
    for _ in range(steps):
        negative_log_likelihood(model(**inputs_of(batch)).logits, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def live_of(folder: Path) -> tuple[LiveModel, torch.optim.Optimizer]:
    """A model that is being trained, and its optimizer with moments."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.load_state_dict(learned(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    train(model, optimizer, steps=1)
    return LiveModel(model, FAMILIES["llama"], folder, CPU, 2, 0, 0.3), optimizer


def test_the_largest_cut_is_found_that_does_no_more_damage(make_checkpoint):
    folder, options = make_checkpoint("llama"), {"remove_channels": 40, "alignment": 8}
    found = {}
    for width in (40, 32, 24, 16, 8):  # by hand: each cut of a model of its own
        live, optimizer = live_of(folder)
        cutter_of = {"remove_channels": 48 - width, "alignment": 8, "max_damage": 1e9}
        cut = cut_live(live, optimizer, criterion_of("obs"), READ, [], **cutter_of)
        assert cut.plan.intermediate_size == width and cut.tried == [(width, cut.loss)]
        found[width] = cut.loss - cut.loss_before
    assert sorted(found.values()) == list(found.values()) and found[40] > 0  # a smaller width does more damage
    for width in (40, 32, 24, 16, 8):
        live, optimizer = live_of(folder)
        cut = cut_live(live, optimizer, criterion_of("obs"), READ, [], max_damage=found[width] + 1e-4, **options)
        assert cut.plan.intermediate_size == width and cut.loss - cut.loss_before == pytest.approx(
            found[width], abs=1e-4
        )
        assert len(cut.tried) <= 4 and cut.tried[0][0] == 8
        gone = [channel for channel in range(48) if channel not in cut.plan.keep_channels[0]]
        assert not live.model.model.layers[0].mlp.down_proj.weight[:, gone].any()
        assert not optimizer.state[live.model.model.layers[0].mlp.up_proj.weight]["exp_avg"][gone].any()


def test_trials_read_few_sequences_and_the_cut_all(make_checkpoint, monkeypatch):
    """What is found by a part of the sequences is fitted to all of them before it is made, and its loss measured."""
    monkeypatch.setattr(live_cuts, "TRIAL_SEQUENCES", 5)
    read, refit = [], live_cuts.refit
    monkeypatch.setattr(live_cuts, "refit", lambda *a, **k: read.append(a[2]) or refit(*a, **k))
    weighed, weights = [], live_cuts.position_weights
    monkeypatch.setattr(live_cuts, "position_weights", lambda m, s: weighed.append(s) or weights(m, s))
    live, optimizer = live_of(make_checkpoint("llama"))
    options = {"remove_channels": 40, "alignment": 8, "max_damage": 2.0, "sensitivity": True}
    cut = cut_live(live, optimizer, criterion_of("obs"), READ, [], **options)
    fitted = [sequence for place, sequence in enumerate(READ) if place % live_cuts.HELD_OUT]
    assert read[-1] == fitted and len(read) == len(cut.tried) + 1 > 2
    spread = [fitted[place] for place in (0, 2, 5, 8, 11)]
    assert all(few == spread for few in read[:-1]) and weighed == [spread]
    found = dict(cut.tried)[cut.plan.intermediate_size]
    assert found - cut.loss_before <= 2.0 and cut.loss != found
    ready = list(live.batches(READ[:: live_cuts.HELD_OUT]))
    assert cut.loss == pytest.approx(live_cuts.mean_loss(live.model, ready, CPU))


def test_damage_is_measured_where_some_token_counts(make_checkpoint):
    """Questions that fill max_tokens say nothing where only solutions count."""
    long = [Sequence(sequence.ids, len(sequence.ids), 1.0) for sequence in sequences(3)]
    read = [long[0], *READ[:7], long[1], *READ[7:14], long[2], *READ[14:]]  # each eighth one is such a question
    for max_damage in (None, 1e9):
        live, optimizer = live_of(make_checkpoint("llama"))
        live.prompt_weight = 0.0
        options = {"remove_channels": 8, "alignment": 8, "max_damage": max_damage}
        cut = cut_live(live, optimizer, criterion_of("obs"), read, [], **options)
        assert cut.plan.intermediate_size == 40 and cut.loss > cut.loss_before > 0


def test_a_cut_that_does_more_damage_than_its_trial_says_so(make_checkpoint, monkeypatch):
    live, optimizer = live_of(make_checkpoint("llama"))
    losses = iter([1.0, 1.5, 1.7])  # uncut, in the trial, of what is made by all sequences
    monkeypatch.setattr(live_cuts, "TRIAL_SEQUENCES", 5)
    monkeypatch.setattr(live_cuts, "mean_loss", lambda *given: next(losses))
    options = {"remove_channels": 8, "alignment": 8, "max_damage": 0.6}
    cut = cut_live(live, optimizer, criterion_of("obs"), READ, [], **options)
    assert cut.plan.notes[-1] == (
        "the cut to 40 channels raised the loss by 0.700 nats a token, more than schedule.max_damage (0.6) and than "
        "when it was tried out"
    )


def test_where_every_cut_does_too_much_nothing_changes(make_checkpoint):
    live, optimizer = live_of(make_checkpoint("llama"))
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    moments = {id(p): state["exp_avg"].clone() for p, state in optimizer.state.items()}
    with pytest.raises(NoCutFits, match=r"smallest cut, to 40 channels, raises the loss by .* more than .* \(1e-09\)"):
        cut_live(live, optimizer, criterion_of("obs"), READ, [], remove_channels=40, alignment=8, max_damage=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.model.state_dict().items())
    assert all(torch.equal(state["exp_avg"], moments[id(p)]) for p, state in optimizer.state.items())
    assert all(parameter.grad is None for parameter in live.model.parameters())


DRAWN = """
import torch


def mine(statistics):
    return torch.rand(statistics.abs_sum_LC.shape, dtype=torch.float64)
"""


def draw(rank: int, ranks: int, folder: Path, out: Path) -> None:
    torch.manual_seed(rank)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for block in model.get_submodule(FAMILIES["llama"].layers):
        fully_shard(block, mesh=init_device_mesh("cpu", (ranks,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    live = LiveModel(model.eval(), FAMILIES["llama"], folder, CPU, 2, 0, 0.3)
    criterion = CriterionConfig(channels="mine", path=str(out / "mine.py"))
    cut = cut_live(live, None, criterion, sequences(0), [], remove_channels=8, alignment=1)
    (out / f"{rank}.json").write_text(cut.plan.model_dump_json())


def test_all_ranks_cut_alike_by_a_criterion_that_draws(make_checkpoint, tmp_path):
    (tmp_path / "mine.py").write_text(DRAWN)
    run_ranks(draw, 2, make_checkpoint("llama"), tmp_path)
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()


def test_plans_that_follow_each_other():
    plans = [plan_keeping([[0, 2, 3, 5], [1, 2, 4, 5]], 6), plan_keeping([[1, 3], [0, 1]], 4)]
    assert standing_after(plans).tolist() == [[2, 5], [1, 2]]
    together = whole_plan(plans)
    assert (together.keep_channels, together.source_intermediate_size) == ([[2, 5], [1, 2]], 6)
    assert (together.keep_layers, together.layer_order) == ([0, 1], [])


def test_plans_that_follow_each_other_and_take_blocks():
    plans = [
        plan_keeping([[0, 1, 2], [3, 4, 5], [1, 3, 5], [0, 2, 4]], 6, [1]),
        plan_keeping([[0, 1], [1, 2], [0, 2]], 3, [2, 0]),
    ]
    assert blocks_after(plans) == [2] and blocks_after(plans[:1]) == [0, 2, 3]
    assert standing_after(plans).tolist() == [[3, 5]]
    assert standing_after(plans[:1]).tolist() == [[0, 1, 2], [1, 3, 5], [0, 2, 4]]
    together = whole_plan(plans)
    assert together.keep_channels[2] == [3, 5]
    assert (together.keep_layers, together.layer_order) == ([2], [1, 3, 0])


def test_rollouts_that_were_cut_off_or_earned_nothing_are_left_out():
    prompts = [[1, 2], [1, 2], [3], [3], [4]]
    responses = [[7], [8, 8], [9], [9, 9, 9], [5]]
    found = rollout_sequences(prompts, responses, [1.0, 0.5, 1.0, 1.0, 0.0], longest=3, most=10)
    assert found == [Sequence([1, 2, 7], 2, 1.0), Sequence([3, 9], 1, 1.0), Sequence([1, 2, 8, 8], 2, 0.5)]
    assert rollout_sequences(prompts, responses, [1.0] * 5, longest=3, most=2) == found[:2]
