"""What ``ptl plan`` prints of every recipe, what it says does not fit, and that it needs no torch and no network."""

import json
import os
import subprocess
import sys

import pytest

from ptl_rl.attention import FLASH
from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config
from ptl_rl.families import FAMILIES, ModelShape, shape_from_config
from ptl_rl.families.published import PUBLISHED, published_config
from ptl_rl.planning.forecast import assumptions_of, device_of, forecast
from ptl_rl.planning.hardware import GPUS
from ptl_rl.planning.model import planned_model

RECIPES = (
    "cpt_code_llama3-8b_4xa100",
    "cpt_gemma2-9b_4xa100",
    "cpt_grpo_qwen2.5-7b_8xh200",
    "cpt_llama3-8b_4xa100",
    "demo_cpt_gemma2_cpu",
    "demo_cpt_grpo_cpu",
    "demo_cpt_llama_cpu",
    "demo_distill_cpu",
    "demo_restart_cpu",
    "demo_governed_cpu",
    "demo_grpo_cpu",
    "demo_prune_once_cpu",
    "grpo_in_place_qwen2.5-7b_8xh200",
    "grpo_qwen2.5-7b_8xh200",
)
NEEDLESS = ("torch", "ray", "verl", "transformers", "numpy", "psutil", "ptl_rl.driver", "ptl_rl.recovery")
"""Modules without which ``ptl plan`` starts at once."""


def plan(repository, recipe, *arguments):
    """The command in a process without network; a last line tells what it has imported."""
    program = (
        "import sys\n"
        "from ptl_rl.cli import app\n"
        "try:\n    app()\nfinally:\n"
        f"    print('imported', *[m for m in {NEEDLESS} if m in sys.modules], file=sys.stderr)\n"
    )
    path = str(repository / "recipes" / f"{recipe}.yaml")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "HF_HOME": "/nowhere"}
    return subprocess.run(
        [sys.executable, "-c", program, "plan", path, *arguments], capture_output=True, text=True, env=env, timeout=60
    )


@pytest.fixture(scope="module")
def plans(repository):
    """Of every recipe what ``ptl plan`` prints, all made in one process without network, and what that has imported."""
    program = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from ptl_rl.cli import app\n"
        "found = {}\n"
        "for path in sys.argv[1:]:\n"
        "    result = CliRunner().invoke(app, ['plan', path])\n"
        "    found[path] = result.exit_code, result.stdout, result.stderr\n"
        f"print(json.dumps([found, [m for m in {NEEDLESS} if m in sys.modules]]))\n"
    )
    paths = [str(repository / "recipes" / f"{recipe}.yaml") for recipe in RECIPES]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "HF_HOME": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, env=env, timeout=120)
    found, imported = json.loads(done.stdout)
    assert imported == []
    return dict(zip(RECIPES, found.values(), strict=True))


def forecast_of(repository, recipe, *settings, gpu=None, **options):
    config = load_config(repository / "recipes" / f"{recipe}.yaml", list(settings))
    return forecast(config, planned_model(config), device_of(config, gpu), **options)


def test_these_are_all_recipes(repository):
    assert {path.stem for path in (repository / "recipes").glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_prints_memory_disk_and_hours(recipe, plans):
    status, printed, errors = plans[recipe]
    assert status == 0 and not errors, errors
    for word in ("evaluate", "score", "slice: check", "disk: ", "hours: ", "assumed: ", "parameters"):
        assert word in printed, word
    assert "will not fit" not in printed


def test_the_json_has_every_figure(repository):
    result = plan(repository, "grpo_qwen2.5-7b_8xh200", "--json", "--price-per-gpu-hour", "2.5")
    found = json.loads(result.stdout)
    assert found["device"] == {"name": "H200", "memory_gib": 139.8, "count": 8}
    assert found["cycles"][10]["parameters"] == 4_532_803_072 and found["cycles"][10]["rollouts"] == 9216
    assert [row["phase"] for row in found["memory"]] == [
        "evaluate",
        "score",
        "slice: check",
        "grpo: rollouts",
        "grpo: weight sync",
        "grpo: log-probs",
        "grpo: reference",
        "grpo: update",
    ]
    update = found["memory"][-1]
    assert update["gib"] == pytest.approx(sum(update["parts_gib"].values()), abs=0.05)
    assert found["memory"][3]["sequences_in_cache"] == 249
    assert found["disk"]["kept_gib"] == pytest.approx(458_990_859_264 / 2**30, abs=0.01)
    assert found["disk"]["resumable_checkpoint_seconds"] == pytest.approx(12 * 7_307_335_168 / 1e9, abs=0.1)
    assert found["hours"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]) / 3600, abs=0.01)
    assert found["price"] == pytest.approx(found["hours"] * 8 * 2.5, rel=1e-3)
    assert found["assumptions"]["mfu"] == 0.35 and found["will_not_fit"] == []
    assert found["attention"] == FLASH and any(
        "flash attention 2 is taken to be installed" in n for n in found["notes"]
    )


def test_flags_change_what_is_assumed(repository):
    base = json.loads(plan(repository, "cpt_llama3-8b_4xa100", "--json").stdout)
    flags = ["--gpu", "h100", "--mfu", "0.5", "--disk-gb-per-second", "4", "--mean-response-share", "0.1"]
    changed = json.loads(plan(repository, "cpt_llama3-8b_4xa100", "--json", *flags).stdout)
    assert changed["device"]["name"] == "H100 80 GB (SXM)" and base["device"]["name"] == "A100 80 GB"
    assert changed["hours"] < 0.3 * base["hours"] and base["price"] is None
    assert changed["disk"]["resumable_checkpoint_seconds"] == pytest.approx(
        base["disk"]["resumable_checkpoint_seconds"] / 4, abs=0.1
    )
    assert [changed["assumptions"][k] for k in ("mfu", "disk_gb_per_second", "mean_response_share")] == [0.5, 4, 0.1]


def test_seven_billion_on_one_small_gpu(repository):
    settings = ["resources.workers_per_node=1"]
    found = forecast_of(repository, "grpo_qwen2.5-7b_8xh200", *settings, gpu="rtx4090")
    problems = {problem.split(" (")[0].split(": ")[1]: problem for problem in found.problems}
    assert "parameters, gradients and optimizer alone take 136.1; more GPUs" in problems["update"]
    assert "lower resources.gpu_memory_utilization" in problems["rollouts"] or "no room" in problems["rollouts"]
    printed = plan(repository, "grpo_qwen2.5-7b_8xh200", "--gpu", "rtx4090", "--set", settings[0])
    assert printed.returncode == 0 and printed.stdout.count("will not fit: ") == len(found.problems) >= 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["recovery.micro_batch_sequences=64"], "grpo: update (cycle 1): 1"),
        (["recovery.micro_batch_sequences=64"], "lower recovery.micro_batch_sequences (64)"),
        (["recovery.gradient_checkpointing=false"], "set recovery.gradient_checkpointing to true"),
        (["resources.gpu_memory_utilization=0.95", "recovery.offload=false"], "set recovery.offload to true"),
        (["resources.gpu_memory_utilization=0.12"], "raise resources.gpu_memory_utilization (0.12)"),
        (["calibration.batch_size=512"], "lower calibration.batch_size (512)"),
        (
            ["criterion.channels=obs", "resources.workers_per_node=1", "resources.gpu=a100-40"],
            "lower calibration.moments_gib (no limit)",
        ),
    ],
)
def test_what_does_not_fit_is_said_with_its_remedy(settings, said, repository):
    problems = forecast_of(repository, "grpo_qwen2.5-7b_8xh200", *settings).problems
    assert any(said in problem for problem in problems), problems


def test_continued_pretraining_that_does_not_fit_says_what_to_change(repository):
    settings = ["recovery.0.cpt.sequences_per_step=256", "recovery.0.cpt.micro_batch_tokens=65536"]
    (problem,) = forecast_of(repository, "cpt_llama3-8b_4xa100", *settings).problems
    assert problem.startswith("recover: cpt (cycle 1): ") and "but it has 79.1" in problem
    assert "lower recovery.micro_batch_tokens (65536), set recovery.reshard_after_forward to true" in problem


def test_a_machine_of_cpus_that_is_too_small(repository, monkeypatch):
    from ptl_rl.planning import forecast as module

    small = module.this_machine(1)
    monkeypatch.setattr(
        module, "this_machine", lambda workers: module.Device("2 CPU cores", 1.0, 0.09, 0.01, is_cpu=True)
    )
    assert small.is_cpu
    problems = forecast_of(repository, "demo_restart_cpu", "resources.device=cpu").problems
    assert any("this machine has 1.0" in problem for problem in problems)
    # Evaluation has 1.7 GiB, the driver and Ray 1.6 beside it; GRPO 3.1 and 5.0.
    room = module.Device("2 CPU cores", 4.4, 0.09, 0.01, is_cpu=True)
    monkeypatch.setattr(module, "this_machine", lambda workers: room)
    (problem,) = forecast_of(repository, "demo_restart_cpu", "resources.device=cpu").problems
    assert problem.startswith("recover: grpo (cycle 1): ") and "GiB on all processes" in problem


def test_widths_that_quantized_kernels_refuse_are_noted(repository):
    settings = ["schedule.channels_per_cycle=1088", "schedule.channels_total=2176", "schedule.alignment=64"]
    notes = forecast_of(repository, "grpo_qwen2.5-7b_8xh200", *settings).notes
    assert any(note.startswith("channels 17856 are no multiples of 128: 4-bit (Marlin)") for note in notes)
    assert not any("Marlin" in note for note in forecast_of(repository, "grpo_qwen2.5-7b_8xh200").notes)


def test_verl_keys_are_said_to_be_left_out(repository):
    found = forecast_of(repository, "grpo_qwen2.5-7b_8xh200", "verl={trainer.test_freq: 3}")
    assert "verl keys of the recipe are not looked at: trainer.test_freq" in found.notes
    assert not any("verl" in note for note in forecast_of(repository, "demo_restart_cpu").notes)


def test_attention_is_assumed_as_the_driver_would_choose(repository):
    assert forecast_of(repository, "cpt_gemma2-9b_4xa100").attention == FLASH
    assert forecast_of(repository, "cpt_gemma2-9b_4xa100", "model.attention=eager").attention == "eager"
    assert forecast_of(repository, "cpt_gemma2-9b_4xa100", "model.dtype=float32").attention == "eager"
    assert forecast_of(repository, "demo_cpt_gemma2_cpu", "resources.device=cpu").attention == "eager"
    for dtype in ("float32", "bfloat16"):
        cpu = forecast_of(repository, "demo_restart_cpu", "resources.device=cpu", f"model.dtype={dtype}")
        assert cpu.attention == "sdpa"


def test_where_a_run_is_planned(repository, monkeypatch):
    from ptl_rl.planning import forecast as module

    config = load_config(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml", ["resources.gpu=null"])
    monkeypatch.setattr(module, "gpu_of_this_machine", lambda: None)
    assert device_of(config, None) == GPUS["h200"] and device_of(config, "L40S") == GPUS["l40s"]
    monkeypatch.setattr(module, "gpu_of_this_machine", lambda: "a100-40")
    assert device_of(config, None) == GPUS["a100-40"]
    demo = load_config(repository / "recipes/demo_restart_cpu.yaml")
    assert device_of(demo, None) == GPUS["a100-40"]  # device: auto
    with pytest.raises(ConfigError, match=r"`gpu`: h20 is not known; known are h200, h100, a100-80"):
        device_of(config, "h20")
    wrong = load_config(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml", ["resources.gpu=b300"])
    with pytest.raises(ConfigError, match=r"resources\.gpu: b300 is not known"):
        device_of(wrong, None)


PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
}
"""As the hub counts them."""


def shape_of(name) -> ModelShape:
    return shape_from_config(PUBLISHED[name], FAMILIES, name)


def test_published_sizes_come_to_the_published_parameters():
    assert {name: shape_of(name).parameters for name in PUBLISHED} == PARAMETERS


def test_a_tuned_model_has_its_base_s_sizes():
    assert published_config("Qwen/Qwen2.5-7B-Instruct") == PUBLISHED["Qwen/Qwen2.5-7B"]
    assert published_config("google/gemma-2-9b-it") == PUBLISHED["google/gemma-2-9b"]
    assert published_config("Qwen/Qwen3-8B-Base") == PUBLISHED["Qwen/Qwen3-8B"]
    assert published_config("Qwen/Qwen3-7B") is None


def test_gemma_ties_its_embeddings_where_its_configuration_does_not_say():
    values = {k: v for k, v in PUBLISHED["google/gemma-2-9b"].items() if k != "tie_word_embeddings"}
    assert shape_from_config(values, FAMILIES, "g").parameters == PARAMETERS["google/gemma-2-9b"]
    llama = {k: v for k, v in PUBLISHED["meta-llama/Llama-3.1-8B"].items() if k != "tie_word_embeddings"}
    assert shape_from_config(llama, FAMILIES, "l").parameters == PARAMETERS["meta-llama/Llama-3.1-8B"]


def test_a_local_folder_wins_over_a_published_name(repository, tmp_path, monkeypatch):
    config = load_config(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml")
    assert planned_model(config).name == "Qwen/Qwen2.5-7B (published sizes; nothing was read)"
    folder = tmp_path / "Qwen" / "Qwen2.5-7B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**PUBLISHED["Qwen/Qwen2.5-7B"], "num_hidden_layers": 20}))
    monkeypatch.chdir(tmp_path)
    found = planned_model(config)
    assert found.name == str(folder) and found.shape.num_hidden_layers == 20


def test_an_unknown_model_offline_is_one_sentence_with_the_known_ones(repository):
    result = plan(repository, "grpo_qwen2.5-7b_8xh200", "--set", "model.path=nobody/nothing-7b")
    assert result.returncode == 2
    first, *rest = result.stderr.strip().splitlines()
    assert first.startswith("error: model.path: nobody/nothing-7b is neither a folder nor a model that the hub gives")
    assert first.endswith("HuggingFaceTB/SmolLM2-135M") and "sizes are known of Qwen/Qwen2.5-0.5B" in first
    assert rest == ["imported"]


def test_a_schedule_that_removes_too_much_is_refused(repository):
    result = plan(repository, "grpo_qwen2.5-7b_8xh200", "--set", "schedule.channels_total=20480")
    assert (
        result.returncode == 2 and "removes 20480 channels per layer, but intermediate_size is 18944" in result.stderr
    )


def test_assumptions_are_those_of_the_device():
    from ptl_rl.planning.hardware import this_machine

    assert assumptions_of(GPUS["h200"], {"mfu": None}).mfu == 0.35
    assert assumptions_of(this_machine(1), {"mfu": None}).start_seconds == 12
    assert assumptions_of(GPUS["h200"], {"mfu": 0.2}).mfu == 0.2
