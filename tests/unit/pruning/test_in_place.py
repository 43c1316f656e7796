"""What is cut in place stays at exactly zero in training, and is the sliced model; on one rank and on two."""

from pathlib import Path

import pytest
import torch
from plans import plan_keeping
from process_ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from ptl_rl.checkpoints.companions import write_config
from ptl_rl.families import FAMILIES
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.slice.in_place import CannotCutInPlace, cut_in_place, own_rows, put_rows
from ptl_rl.pruning.slice.slicing import config_changes, slice_checkpoint
from ptl_rl.pruning.slice.training_state import NotCut, UnknownOptimizer, sliced_state

STEPS = 4


def plan_of(layers: int, channels: int, keep: int, keep_layers: list[int], seed: int = 0) -> PruningPlan:
    """Keeps ``keep`` channels a block, drawn at random; of one seed, fewer are among more."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(channels, generator=generator) for _ in range(layers)]
    kept = [ids[:keep].sort().values.tolist() for ids in order]
    return plan_keeping(kept, channels, [layer for layer in range(layers) if layer not in keep_layers])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ids_BT: torch.Tensor, before_BTV: torch.Tensor) -> None:
    """Steps of likelihood with a KL term to what the model gave before, clipped."""
    for _ in range(STEPS):
        log_p_BTV = model(input_ids=ids_BT).logits.float().log_softmax(-1)
        loss = -log_p_BTV[:, :-1].gather(-1, ids_BT[:, 1:, None]).mean()
        kl = (log_p_BTV.exp() * (log_p_BTV - before_BTV.log_softmax(-1))).sum(-1).mean()
        (loss + 0.1 * kl).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def gone_of(model: nn.Module, family, plan: PruningPlan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The part of one of the model's tensors that the plan leaves out, by the projections' meaning."""
    prefix, _, rest = name.removeprefix(f"{family.layers}.").partition(".")
    layer = int(prefix)
    gone = [c for c in range(plan.source_intermediate_size) if c not in plan.keep_channels[layer]]
    if layer not in plan.keep_layers:
        return tensor if "norm" not in rest and "q_proj" not in rest and "k_proj" not in rest else tensor[:0]
    if "gate_proj" in rest or "up_proj" in rest:
        return tensor[gone]
    return tensor[:, gone] if "down_proj.weight" in rest else tensor[:0]


def check(rank: int, ranks: int, folder: Path, family_name: str, out: Path) -> None:
    family = FAMILIES[family_name]
    torch.manual_seed(0)
    model, optimizer = sharded(folder, family_name, ranks)
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, 290, (4, 17), generator=generator)
    with torch.no_grad():
        before_BTV = model(input_ids=ids_BT).logits.float()
    train(model, optimizer, ids_BT, before_BTV)  # so that there are moments
    for keep, keep_layers in ((31, [0, 1, 2]), (19, [0, 2])):  # sizes that two ranks share unevenly
        plan = plan_of(3, 48, keep, keep_layers)
        cut_in_place(model, family, plan, optimizer)
        train(model, optimizer, ids_BT, before_BTV)
        zeroed = 0
        for name, parameter in model.named_parameters():
            if not name.startswith(f"{family.layers}."):
                continue
            moments = optimizer.state[parameter]
            for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]):
                gone = gone_of(model, family, plan, name, whole(tensor.detach()))
                assert not gone.any(), name
                zeroed += gone.numel()
                assert whole(tensor.detach()).any() or gone.numel() == tensor.numel(), name
        assert zeroed > 0
    with torch.no_grad():
        found_BTV = model(input_ids=ids_BT).logits
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options) if ranks > 1 else model.state_dict()
    if rank == 0:
        trained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
        trained.load_state_dict(state)
        trained.save_pretrained(out / "trained")
        slice_checkpoint(out / "trained", plan, out / "sliced")
        sliced = AutoModelForCausalLM.from_pretrained(out / "sliced", attn_implementation="eager")
        assert (sliced.config.intermediate_size, sliced.config.num_hidden_layers) == (19, 2)
        with torch.no_grad():
            expected_BTV = sliced.eval()(input_ids=ids_BT).logits
        assert torch.allclose(found_BTV, expected_BTV, atol=1e-5 * float(expected_BTV.abs().max()))
        assert not torch.allclose(found_BTV, before_BTV, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_cut_stays_zero_and_is_the_sliced_model(family, make_checkpoint, tmp_path):
    check(0, 1, make_checkpoint(family), family, tmp_path)


def check_all(rank: int, ranks: int, folders: dict[str, Path], out: Path) -> None:
    for family, folder in folders.items():
        own = out / family
        own.mkdir(exist_ok=True)
        check(rank, ranks, folder, family, own)
        go_on(rank, ranks, folder, family, own)


def test_every_family_on_two_ranks(make_checkpoint, tmp_path):
    run_ranks(check_all, 2, {family: make_checkpoint(family) for family in FAMILIES}, tmp_path)


def sharded(folder: Path, family_name: str, ranks: int) -> tuple:
    """A model in training, of this folder's shapes, and its optimizer."""
    family = FAMILIES[family_name]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for block in model.get_submodule(family.layers):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def go_on(rank: int, ranks: int, folder: Path, family_name: str, out: Path) -> None:
    """Sliced with its optimizer in the middle of a training, a model goes on as it would have unsliced."""
    family = FAMILIES[family_name]
    torch.manual_seed(0)
    model, optimizer = sharded(folder, family_name, ranks)
    ids_BT = torch.randint(0, 290, (4, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before_BTV = model(input_ids=ids_BT).logits.float()
    train(model, optimizer, ids_BT, before_BTV)
    plan = plan_of(3, 48, 19, [0, 2])
    with pytest.raises(NotCut, match="is to lose what is not zero"):
        sliced_state(model, optimizer, family, plan, torch.device("cpu"))
    cut_in_place(model, family, plan, optimizer)
    train(model, optimizer, ids_BT, before_BTV)
    state = sliced_state(model, optimizer, family, plan, torch.device("cpu"))
    names = [name for name, _ in model.named_parameters()]
    moments = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    expected = [name for name in names if not name.startswith(f"{family.layers}.1.")]
    assert list(state.optimizer["state"]) == list(range(len(expected)))
    for place, name in enumerate(expected):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            kept = whole(moments[name][key])
            if key != "step" and family.layers in name:
                layer = int(name.removeprefix(f"{family.layers}.").partition(".")[0])
                if "gate_proj" in name or "up_proj" in name:
                    kept = kept[plan.keep_channels[layer]]
                elif "down_proj.weight" in name:
                    kept = kept[:, plan.keep_channels[layer]]
            found = state.optimizer["state"][place][key]
            assert torch.equal(whole(found), kept), (name, key)
            assert not isinstance(found, DTensor) or found.to_local().untyped_storage().nbytes() <= kept.nbytes
    if rank == 0:
        (out / "small").mkdir()
        write_config(folder, out / "small", **config_changes(folder, plan))
        # Any weights do: all that counts is loaded from the state.
        config = AutoConfig.from_pretrained(out / "small")
        AutoModelForCausalLM.from_config(config).save_pretrained(out / "small")
        write_config(folder, out / "small", **config_changes(folder, plan))
    if ranks > 1:
        torch.distributed.barrier()
    small, small_optimizer = sharded(out / "small", family_name, ranks)
    torch.save((state.model, state.optimizer), out / f"{rank}.pt")  # as verl does, so that nothing is shared
    weights, moments = torch.load(out / f"{rank}.pt", weights_only=False)
    small.load_state_dict(weights)
    small_optimizer.load_state_dict(moments)
    with torch.no_grad():
        logits_BTV = model(input_ids=ids_BT).logits
        assert torch.allclose(small(input_ids=ids_BT).logits, logits_BTV, atol=1e-5 * float(logits_BTV.abs().max()))
    train(model, optimizer, ids_BT, before_BTV)
    train(small, small_optimizer, ids_BT, before_BTV)
    with torch.no_grad():
        found_BTV, expected_BTV = small(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits
    assert torch.allclose(found_BTV, expected_BTV, atol=1e-3 * float(expected_BTV.abs().max()))
    assert not torch.allclose(found_BTV, logits_BTV, atol=2e-2 * float(expected_BTV.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_goes_on_sliced_as_it_would_have_gone_on(family, make_checkpoint, tmp_path):
    go_on(0, 1, make_checkpoint(family), family, tmp_path)


def test_an_optimizer_that_keeps_its_parameters_otherwise_is_refused(make_checkpoint):
    model, plan = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama")), plan_of(3, 48, 20, [0, 1, 2])
    cut_in_place(model, FAMILIES["llama"], plan)
    first, *others = model.parameters()
    for groups in ([{"params": [first]}, {"params": others}], [*others, first], others):
        with pytest.raises(UnknownOptimizer, match=r"only one can be sliced|in the model's order"):
            sliced_state(model, torch.optim.AdamW(groups, lr=1e-2), FAMILIES["llama"], plan, torch.device("cpu"))


def put(rank: int, ranks: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    weight = torch.arange(35.0).view(7, 5)
    parameter = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)])
    put_rows(parameter, own_rows(parameter, weight))
    assert torch.equal(parameter.full_tensor(), weight)
    put_rows(parameter, own_rows(parameter, -weight[:, :2]), columns=[1, 4])
    expected = weight.clone()
    expected[:, [1, 4]] = -weight[:, :2]
    assert torch.equal(parameter.full_tensor(), expected)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_weight_is_written_where_it_lies(ranks):
    run_ranks(put, ranks)


def test_blocks_whose_biases_would_go_on_learning_are_refused(make_checkpoint):
    config = AutoConfig.from_pretrained(make_checkpoint("llama"))
    config.attention_bias = True
    model = AutoModelForCausalLM.from_config(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CannotCutInPlace, match=r"model\.layers\.1\.self_attn\.o_proj\.bias: a removed block would"):
        cut_in_place(model, FAMILIES["llama"], plan_of(3, 48, 20, [0, 2]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    cut_in_place(model, FAMILIES["llama"], plan_of(3, 48, 20, [0, 1, 2]))


def test_gradients_that_wait_for_a_step_are_cut_too(make_checkpoint):
    model, plan = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama")), plan_of(3, 48, 20, [0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids_BT = torch.arange(24).view(2, 12)
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    cut_in_place(model, FAMILIES["llama"], plan, optimizer)
    optimizer.step()
    gone = [channel for channel in range(48) if channel not in plan.keep_channels[1]]
    assert not model.model.layers[1].mlp.down_proj.weight[:, gone].any()


def test_a_wrapped_model_is_refused(make_checkpoint):
    model = nn.ModuleDict({"wrapped": AutoModelForCausalLM.from_pretrained(make_checkpoint("llama"))})
    with pytest.raises(CannotCutInPlace, match=r"no parameter model\.layers\.0\.mlp\.gate_proj\.weight: is it wrapped"):
        cut_in_place(model, FAMILIES["llama"], plan_of(3, 48, 20, [0, 1, 2]))
