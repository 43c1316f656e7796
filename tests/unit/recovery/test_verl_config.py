"""Recipes render to configurations that verl's own validation accepts, and keep what was asked for."""

import json
from pathlib import Path

import pytest
from verl.utils.config import omega_conf_to_dataclass

from ptl_rl.config import ConfigError
from ptl_rl.platform.checks import ENGINE_LIBRARY
from ptl_rl.platform.verl_engine import StepwiseCheckpointConfig
from ptl_rl.recipe import load_config
from ptl_rl.recovery.settings import CptConfig
from ptl_rl.recovery.sft_config import compose_sft, render_sft
from ptl_rl.recovery.verl_config import compose, render
from ptl_rl.stage import StageSpec

RECIPES = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("*.yaml"))


def spec(device: str, folder: Path) -> StageSpec:
    return StageSpec(
        name="recover",
        cycle=1,
        round=0,
        device=device,
        ray_address="127.0.0.1:1",
        stage_id="x",
        source=folder / "sliced",
        parent=folder / "original",
        out=folder / "out",
        work=folder / "work",
        progress=folder / "progress.jsonl",
        result=folder / "result.json",
        subset=0,
        subsets=1,
        remove_channels=64,
        remove_layers=0,
        removed_layers=0,
        steps=5,
        alignment=64,
    )


DEMO = next(path for path in RECIPES if path.stem == "demo_grpo_cpu")
EVERY_RECOVERY = [
    pytest.param(recipe, part, id=f"{recipe.stem}-{recovery.method}")
    for recipe in RECIPES
    for part, recovery in enumerate(load_config(recipe).recovery)
]


@pytest.mark.parametrize(("recipe", "part"), EVERY_RECOVERY)
def test_every_recipe_is_accepted_by_verl(recipe, part, tmp_path):
    config = load_config(recipe)
    recovery = config.recovery[part]
    device = "cuda" if config.resources.device == "cuda" else "cpu"
    told = spec(device, tmp_path).model_copy(update={"part": part})
    if isinstance(recovery, CptConfig):
        verl = compose_sft(render_sft(config, recovery, told, tmp_path / "s.arrow", recovery.sequences_per_step))
        for section in ("engine", "optim", "checkpoint"):
            omega_conf_to_dataclass(verl[section])  # verl's own checks; those of the model want its folder
        assert (verl.trainer.total_training_steps, verl.optim.lr) == (5, recovery.learning_rate)
        assert verl.engine.reshard_after_forward == recovery.reshard_after_forward
        checkpoint, model = verl.checkpoint, verl.model
    else:
        verl = compose(render(config, told))
        rollout, actor = verl.actor_rollout_ref.rollout, verl.actor_rollout_ref.actor
        assert verl.algorithm.adv_estimator == "grpo"
        assert verl.trainer.total_training_steps == 5
        assert rollout.n == recovery.rollouts_per_prompt == (8 if recovery.method == "grpo" else 1)
        assert (actor.clip_ratio_low, actor.clip_ratio_high) == (recovery.clip_low, recovery.clip_high)
        assert (actor.use_kl_loss, actor.kl_loss_coef) == (recovery.kl_loss > 0, recovery.kl_loss)
        assert Path(verl.reward.custom_reward_function.path).name == "user.py"
        checkpoint, model = actor.checkpoint, verl.actor_rollout_ref.model
    told_workers = omega_conf_to_dataclass(checkpoint)
    assert isinstance(told_workers, StepwiseCheckpointConfig) and told_workers.last_step == 5
    resumable = ["model", "optimizer", "extra"] if recovery.save_every_steps else []
    assert told_workers.save_contents == ["hf_model", *resumable] and told_workers.load_contents == resumable
    assert model.external_lib == ENGINE_LIBRARY  # without it rank 0 gathers the model to write it
    assert verl.trainer.n_gpus_per_node == config.resources.workers_per_node


@pytest.mark.parametrize(
    ("prompts", "rollouts", "workers", "wanted", "found"),
    [(32, 8, 1, 64, 64), (16, 1, 2, 16, 8), (12, 4, 2, 16, 12), (6, 7, 1, 8, 7), (4, 1, 2, 64, 2)],
)
def test_a_micro_batch_divides_what_a_worker_gets(prompts, rollouts, workers, wanted, found, tmp_path):
    sizes = {"prompts_per_step": prompts, "rollouts_per_prompt": rollouts, "micro_batch_sequences": wanted}
    settings = [f"recovery={{distill: {json.dumps(sizes)}}}", f"resources.workers_per_node={workers}"]
    verl = compose(render(load_config(DEMO, settings), spec("cpu", tmp_path)))
    actor, rollout = verl.actor_rollout_ref.actor, verl.actor_rollout_ref.rollout
    assert actor.ppo_micro_batch_size_per_gpu == rollout.log_prob_micro_batch_size_per_gpu == found


def test_verl_keys_of_a_recipe_win(tmp_path):
    config = load_config(DEMO, ["verl.actor_rollout_ref.actor.entropy_coeff=0.25", "verl.trainer.test_freq=3"])
    verl = compose(render(config, spec("cpu", tmp_path)))
    assert verl.actor_rollout_ref.actor.entropy_coeff == 0.25 and verl.trainer.test_freq == 3


def test_what_verl_refuses_is_quoted(tmp_path):
    rollout = "verl.actor_rollout_ref.rollout"
    config = load_config(DEMO, [f"{rollout}.temperature=0", f"{rollout}.val_kwargs.do_sample=true"])
    with pytest.raises(ConfigError, match=r"verl refuses the configuration: .*temperature"):
        compose(render(config, spec("cpu", tmp_path)))


def test_keys_of_a_users_reward_reach_verl(tmp_path):
    (tmp_path / "mine.py").write_text("def f(data_source, solution_str, ground_truth, extra_info=None): return 1.0\n")
    config = load_config(DEMO, [f"reward.path={tmp_path}/mine.py", "reward.name=f"])
    verl = compose(render(config, spec("cpu", tmp_path), {"acc": "number", "note": "text"}))
    arguments = verl.reward.custom_reward_function.reward_kwargs
    assert dict(arguments.user_keys) == {"acc": "number", "note": "text"}
    assert (arguments.user_path, arguments.user_name) == (f"{tmp_path}/mine.py", "f")


def test_verls_group_filter_gets_verls_own_replay_buffer(tmp_path):
    plain = compose(render(load_config(DEMO), spec("cpu", tmp_path)))
    assert plain.trainer.v1.sampler.custom_sampler.name == "QuickReplayBuffer"
    config = load_config(DEMO, ["verl.algorithm.filter_groups.enable=true"])
    filtered = compose(render(config, spec("cpu", tmp_path)))
    assert filtered.trainer.v1.sampler.custom_sampler.name is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_unpruned_parent_teaches(device, tmp_path):
    recipe = DEMO if device == "cpu" else next(path for path in RECIPES if path.stem == "grpo_qwen2.5-7b_8xh200")
    config = load_config(recipe, ["recovery={distill: {teacher_workers_per_node: 2, prompts_per_step: 96, topk: 16}}"])
    if device == "cpu":
        config = load_config(recipe, ["recovery={distill: {topk: 16}}"])
    verl = compose(render(config, spec(device, tmp_path)))
    teacher = verl.distillation.teacher_models.teacher_model
    assert verl.distillation.enabled and teacher.model_path == str(tmp_path / "original")
    assert verl.distillation.n_gpus_per_node == (2 if device == "cuda" else 1)
    assert verl.trainer.n_gpus_per_node == (6 if device == "cuda" else 1)
    loss = verl.distillation.distillation_loss
    assert (loss.loss_mode, loss.topk, loss.use_task_rewards, loss.use_policy_gradient) == (
        "forward_kl_topk", 16, False, False,
    )  # fmt: skip
    assert verl.actor_rollout_ref.rollout.n == 1
    omega_conf_to_dataclass(verl.distillation)  # verl's own checks of the parent's share of the GPUs
