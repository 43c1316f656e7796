"""Recipes render to configurations that verl's own validation accepts, and keep what was asked for."""

import json
from pathlib import Path

import pytest
from verl.trainer.ppo.utils import create_rl_sampler
from verl.utils.config import omega_conf_to_dataclass

from ptl_rl.config import ConfigError, CptConfig
from ptl_rl.config.recipe import load_config
from ptl_rl.families import FAMILIES
from ptl_rl.families.base import shape_from_config
from ptl_rl.families.published import PUBLISHED
from ptl_rl.recovery.sft_config import compose_sft, render_sft
from ptl_rl.recovery.verl_config import compose, render
from ptl_rl.stage import StageSpec
from ptl_rl.verl_patches import ENGINE_LIBRARY
from ptl_rl.verl_patches.engine import StepwiseCheckpointConfig

RECIPES = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("*.yaml"))


def spec(device: str, folder: Path, attention: str = "sdpa") -> StageSpec:
    return StageSpec(
        name="recover",
        cycle=1,
        round=0,
        device=device,
        attention=attention,
        ray_address="127.0.0.1:1",
        stage_id="x",
        source=folder / "sliced",
        parent=folder / "original",
        out=folder / "out",
        work=folder / "work",
        progress=folder / "progress.jsonl",
        result=folder / "result.json",
        data=folder / "data",
        subset=0,
        subsets=1,
        remove_channels=64,
        remove_layers=0,
        removed_layers=0,
        steps=5,
        alignment=64,
    )


DEMO = next(path for path in RECIPES if path.stem == "demo_restart_cpu")
EVERY_RECOVERY = [
    pytest.param(recipe, part, id=f"{recipe.stem}-{recovery.method}")
    for recipe in RECIPES
    for part, recovery in enumerate(load_config(recipe).recovery)
]


@pytest.mark.parametrize("attention", ["flash_attention_2", "eager"])
@pytest.mark.parametrize(("recipe", "part"), EVERY_RECOVERY)
def test_every_recipe_is_accepted_by_verl(recipe, part, attention, tmp_path):
    config = load_config(recipe)
    recovery = config.recovery[part]
    device = "cuda" if config.resources.device == "cuda" else "cpu"
    if device == "cpu" and attention == "flash_attention_2":
        pytest.skip("flash attention has no CPU build")
    told = spec(device, tmp_path, attention).model_copy(update={"part": part})
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
        longest = config.data.max_prompt_tokens + config.data.max_response_tokens
        assert verl.data.filter_overlong_prompts is True and rollout.max_model_len == longest
        assert verl.trainer.total_training_steps == 5
        assert rollout.n == recovery.rollouts_per_prompt == (8 if recovery.method == "grpo" else 1)
        assert (actor.clip_ratio_low, actor.clip_ratio_high) == (recovery.clip_low, recovery.clip_high)
        assert (actor.use_kl_loss, actor.kl_loss_coef) == (recovery.kl_loss > 0, recovery.kl_loss)
        assert Path(verl.reward.custom_reward_function.path).name == "user.py"
        checkpoint, model = actor.checkpoint, verl.actor_rollout_ref.model
    told_workers = omega_conf_to_dataclass(checkpoint)
    assert isinstance(told_workers, StepwiseCheckpointConfig) and told_workers.last_step == 5
    in_place = config.schedule.mode == "in_place"
    resumable = ["model", "optimizer", "extra"] if recovery.save_every_steps or in_place else []
    assert told_workers.save_contents == ["hf_model", *resumable] and told_workers.load_contents == resumable
    assert model.external_lib == ENGINE_LIBRARY  # without it rank 0 gathers the model to write it
    assert model.override_config.attn_implementation == attention
    assert model.use_remove_padding == (attention == "flash_attention_2")
    assert verl.trainer.n_gpus_per_node == config.resources.workers_per_node


def test_a_rate_that_falls_after_the_last_cut_is_verls_constant_one_which_the_worker_lets_fall(tmp_path):
    config = load_config(DEMO, ["schedule.mode=in_place", "recovery.learning_rate_schedule=cosine_after_cuts"])
    key, told = "actor_rollout_ref.actor.optim.lr_scheduler_type", spec("cpu", tmp_path)
    assert render(config, told)[key] == "constant"
    assert render(config, told.model_copy(update={"round": 1}))[key] == "cosine"  # more steps, without cuts


def test_no_two_recoveries_of_a_cycle_take_its_rows_in_one_order(tmp_path):
    """A second one of 50 steps would read the first one's prompts again, and leave the others."""
    settings = [f"recovery={json.dumps([{'grpo': {}}, {'distill': {}}, {'cpt': {}}, {'cpt': {}}])}"]
    config, told = load_config(DEMO, settings), spec("cpu", tmp_path)

    def order(**changes) -> tuple[int, ...]:
        return tuple(create_rl_sampler(compose(render(config, told.model_copy(update=changes))).data, range(64)))

    def seed(config=config, **changes) -> int:
        of = told.model_copy(update=changes)
        return compose_sft(render_sft(config, config.recovery[of.part], of, tmp_path / "s", 32)).trainer.seed

    assert order() == order()  # after a resume, too
    assert len({order(), order(part=1), order(round=1), order(cycle=2)}) == 4
    assert len({seed(part=2), seed(part=3), seed(part=2, round=1), seed(part=2, cycle=2)}) == 4
    with_key = load_config(DEMO, ["recovery={cpt: {verl: {trainer.seed: 7}}}"])
    assert seed(with_key) == 7


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


def test_the_largest_tensor_fits_into_a_bucket_of_shared_memory(tmp_path):
    """On CPUs; verl's assertion would leave vLLM waiting for weights that never come."""
    key = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
    sizes = {"model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 2}
    smollm2 = shape_from_config(
        {**sizes, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}, FAMILIES, "x"
    )
    tiny = shape_from_config({**sizes, "hidden_size": 192, "intermediate_size": 1280, "vocab_size": 383}, FAMILIES, "x")
    qwen = shape_from_config(PUBLISHED["Qwen/Qwen2.5-7B"], FAMILIES, "x")
    for shape, wanted in ((smollm2, 108), (tiny, 64)):  # 49152 x 576 x 4 bytes are 108 MiB
        assert render(load_config(DEMO), spec("cpu", tmp_path), shape=shape)[key] == wanted
    for shape, wanted in ((smollm2, 2048), (qwen, 2079)):  # 152064 x 3584 x 4 bytes are 2079 MiB
        assert render(load_config(QWEN), spec("cuda", tmp_path), shape=shape)[key] == wanted


QWEN = next(path for path in RECIPES if path.stem == "grpo_qwen2.5-7b_8xh200")
LLAMA = next(path for path in RECIPES if path.stem == "cpt_llama3-8b_4xa100")


@pytest.mark.parametrize(
    ("attention", "setting", "is_dynamic"),
    [("flash_attention_2", None, True), ("sdpa", None, False), ("flash_attention_2", False, False)],
)
def test_batches_are_filled_by_tokens_where_nothing_is_padded(attention, setting, is_dynamic, tmp_path):
    settings = [] if setting is None else [f"recovery.dynamic_batches={json.dumps(setting)}"]
    verl = compose(render(load_config(QWEN, settings), spec("cuda", tmp_path, attention)))
    actor, rollout, ref = (verl.actor_rollout_ref[part] for part in ("actor", "rollout", "ref"))
    for part in (rollout, ref):
        assert part.log_prob_use_dynamic_bsz == actor.use_dynamic_bsz == is_dynamic
        assert part.log_prob_max_token_len_per_gpu == actor.ppo_max_token_len_per_gpu == 4 * (2048 + 3000)
        assert part.log_prob_micro_batch_size_per_gpu == actor.ppo_micro_batch_size_per_gpu == 4


@pytest.mark.parametrize("attention", ["flash_attention_2", "sdpa"])
def test_rows_of_cpt_are_as_many_as_the_tokens_allow_when_all_are_long(attention, tmp_path):
    config = load_config(LLAMA)
    verl = compose_sft(render_sft(config, config.recovery[0], spec("cuda", tmp_path, attention), tmp_path / "s", 24))
    assert verl.data.use_dynamic_bsz == (attention == "flash_attention_2")
    assert verl.data.max_token_len_per_gpu == 8192
    assert verl.data.micro_batch_size_per_gpu == 6  # of 6 on each of four workers, and 8 x 1024 tokens would do
    config = load_config(LLAMA, ["recovery.0.cpt.micro_batch_tokens=4096"])
    verl = compose_sft(render_sft(config, config.recovery[0], spec("cuda", tmp_path, attention), tmp_path / "s", 24))
    assert verl.data.micro_batch_size_per_gpu == 3


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "fp32"), ("bfloat16", None)])
def test_on_gpus_too_the_trainer_computes_in_the_type_of_the_rollouts(dtype, expected, tmp_path):
    recoveries = json.dumps([{"grpo": {}}, {"cpt": {}}])
    config = load_config(DEMO, ["resources.device=cuda", f"model.dtype={dtype}", f"recovery={recoveries}"])
    told = spec("cuda", tmp_path)
    rl = compose(render(config, told)).actor_rollout_ref
    sft = compose_sft(render_sft(config, config.recovery[1], told, tmp_path / "s.arrow", 32))
    assert rl.rollout.dtype == dtype
    for engine in (rl.actor.fsdp_config, rl.ref.fsdp_config, sft.engine):
        # Without it verl takes bfloat16, whatever the parameters' type.
        assert (engine.get("mixed_precision") or {}).get("param_dtype") == expected


def test_verl_keys_of_a_recipe_win(tmp_path):
    config = load_config(DEMO, ["verl.actor_rollout_ref.actor.entropy_coeff=0.25", "verl.trainer.test_freq=3"])
    verl = compose(render(config, spec("cpu", tmp_path)))
    assert verl.actor_rollout_ref.actor.entropy_coeff == 0.25 and verl.trainer.test_freq == 3


def test_what_verl_refuses_is_quoted(tmp_path):
    rollout = "verl.actor_rollout_ref.rollout"
    config = load_config(DEMO, [f"{rollout}.temperature=0", f"{rollout}.val_kwargs.do_sample=true"])
    with pytest.raises(ConfigError, match=r"verl refuses the configuration: .*temperature"):
        compose(render(config, spec("cpu", tmp_path)))


def test_an_engine_of_several_workers_has_processes_for_them(tmp_path):
    key = "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend"
    assert key in render(load_config(DEMO), spec("cpu", tmp_path))
    parallel = load_config(DEMO, ["verl.actor_rollout_ref.rollout.tensor_model_parallel_size=2"])
    assert key not in render(parallel, spec("cpu", tmp_path))


def test_keys_of_a_users_reward_reach_verl(tmp_path):
    (tmp_path / "mine.py").write_text("def f(data_source, solution_str, ground_truth, extra_info=None): return 1.0\n")
    config = load_config(DEMO, [f"reward.path={tmp_path}/mine.py", "reward.name=f"])
    verl = compose(render(config, spec("cpu", tmp_path), {"acc": "number", "note": "text"}))
    arguments = verl.reward.custom_reward_function.reward_kwargs
    assert dict(arguments.user_keys) == {"acc": "number", "note": "text"}
    assert (arguments.user_path, arguments.user_name) == (f"{tmp_path}/mine.py", "f")
    opened = compose(render(load_config(DEMO), spec("cpu", tmp_path), think_opened=True))
    assert opened.reward.custom_reward_function.reward_kwargs.think_opened is True


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
