"""Continued pre-training of tiny models: two problems to read, and the configuration of verl's trainer."""

from pathlib import Path

from ptl_rl.config.recipe import parse_config
from ptl_rl.data.corpora import Record
from ptl_rl.recovery.sequences import SequenceFile
from ptl_rl.recovery.sft_config import compose_sft, render_sft
from ptl_rl.stage import StageSpec

PROBLEM = Record("Ann has 3 marbles and buys 4. How many?", "3 + 4 = 7. \\boxed{7}", "7", "s", "1")
LONGER = Record("Ben has 3 bags with 4 marbles each. How many?", "3 * 4 = 12, so \\boxed{12}", "12", "s", "2")


def sft_config(folder: Path, model: Path, sequences: Path, workers: int, **recovery):
    config = parse_config(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "schedule": {"channels_per_cycle": [16], "alignment": 16},
            "recovery": [{"cpt": {"steps": 3, "learning_rate": 1e-3, "max_tokens": 64, "gradient_checkpointing": False}
                          | {"micro_batch_tokens": 64, "sequences_per_step": 8} | recovery}],
            "resources": {"workers_per_node": workers},
        }
    )  # fmt: skip
    names = ("source", "parent", "out", "work", "progress", "result", "data")
    spec = StageSpec(
        name="recover", cycle=1, round=0, device="cpu", attention="sdpa", ray_address="", stage_id="x", subset=0,
        subsets=1, remove_channels=16, remove_layers=0, removed_layers=0, steps=3, alignment=16,
        **{name: model if name in ("source", "parent") else folder / name for name in names},
    )  # fmt: skip
    return compose_sft(render_sft(config, config.recovery[0], spec, sequences, 8))


def engine_of(verl):
    """verl's engine of such a configuration, on every rank."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine import EngineRegistry

    model, engine, optimizer, checkpoint = (
        omega_conf_to_dataclass(verl[name]) for name in ("model", "engine", "optim", "checkpoint")
    )
    optimizer.total_training_steps = 3
    engine.use_remove_padding = False
    built = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=model,
        engine_config=engine,
        optimizer_config=optimizer,
        checkpoint_config=checkpoint,
    )
    built.initialize()
    return built


def batch_of(sequences: SequenceFile, indices, verl):
    """Some sequences as verl's trainer hands them to an engine."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import SFTTensorCollator

    data = SFTTensorCollator("no_padding")([sequences[i] for i in indices])
    settings = {"use_remove_padding": False, "use_dynamic_bsz": True, "temperature": 1.0, "pad_mode": "no_padding"}
    settings |= {"max_token_len_per_gpu": verl.data.max_token_len_per_gpu, "global_batch_size": 8, "pad_token_id": 0}
    return tu.get_tensordict(tensor_dict=data, non_tensor_dict=settings)


def loss_of_step(engine, sequences: SequenceFile, verl, step: int, rank: int, ranks: int) -> float:
    """Have all ranks make one step of eight sequences, drawn by its number; gives the loss before it."""
    from functools import partial

    import torch
    from verl.workers.utils.losses import sft_loss

    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(step)).tolist()[:8]
    with engine.train_mode():
        found = engine.train_batch(batch_of(sequences, order[rank::ranks], verl), partial(sft_loss, config=None))
        engine.lr_scheduler_step()
    loss = torch.tensor(sum(found["loss"]))
    torch.distributed.all_reduce(loss, torch.distributed.ReduceOp.AVG)
    return float(loss)
