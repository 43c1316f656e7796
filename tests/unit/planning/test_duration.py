"""Hours: the arithmetic by hand, and passes as the engine counts them."""

import dataclasses

import pyarrow.parquet
import pytest
import torch

from ptl_rl.config import CriterionConfig
from ptl_rl.config.recipe import load_config, parse_config
from ptl_rl.data.encoding import Sequence
from ptl_rl.families import FAMILIES, read_shape, shape_from_config
from ptl_rl.families.published import PUBLISHED
from ptl_rl.planning.assumptions import CPU, Assumptions
from ptl_rl.planning.duration import FINALISTS, Clock, score_passes
from ptl_rl.planning.hardware import GPUS, this_machine
from ptl_rl.planning.memory import Planned
from ptl_rl.planning.rows import evaluation_rows, known_rows, unnamed_notes
from ptl_rl.planning.schedule import Cut, planned_cuts
from ptl_rl.planning.serving_memory import Engine
from ptl_rl.pruning import engine
from ptl_rl.pruning.choose import absorption

QWEN, LLAMA = (
    shape_from_config(PUBLISHED[name], FAMILIES, name) for name in ("Qwen/Qwen2.5-7B", "meta-llama/Meta-Llama-3-8B")
)


def clock_of(repository, name, *settings, attention="flash_attention_2", **assumed):
    config = load_config(repository / "recipes" / name, list(settings))
    return Clock(Planned(config, GPUS[config.resources.gpu], attention), Assumptions(**assumed))


def test_the_steps_of_8b_on_four_gpus(repository):
    clock = clock_of(repository, "cpt_llama3-8b_4xa100.yaml", mfu=0.4, mean_document_share=0.5)
    shape = LLAMA.sliced(channels=1024)
    (recovery,) = clock.config.recovery
    # A step reads 32 x 512 tokens, a quarter on each GPU. A token's forward pass: twice the weights of 32 blocks
    # (41,943,040 + 163,577,856), 4 x 4096 x 256 of attention, and the head's 2 x 128256 x 4096; backward twice that,
    # and the blocks once more for checkpointing.
    blocks, head = 32 * (2 * 205_520_896 + 4 * 4096 * 256), 2 * 525_336_576
    step = 4096 * (4 * blocks + 3 * head) / (312e12 * 0.4)
    assert clock.cpt(shape, LLAMA, recovery, 5000) == pytest.approx(
        60 + 4 * 7_627_608_064 / 1e9 + 5000 * step + (4 * 12 + 4) * 7_627_608_064 / 1e9  # four checkpoints and the last
    )


def test_decoding_waits_for_memory(repository):
    clock = clock_of(repository, "grpo_qwen2.5-7b_8xh200.yaml", decoding_step_seconds=0.0, bandwidth_share=1.0)
    engine_ = Engine(QWEN, 2, 1, 5048, 256)
    # 64 answers on one engine, 900 tokens on average: every step reads 15.2 GB of weights and 57,344 bytes for each of
    # 650 tokens of each sequence; the last answers are 3000 tokens long and eight go on together.
    full = (15_231_233_024 + 64 * 57_344 * 650) / 4.8e12
    last = (15_231_233_024 + 8 * 57_344 * 650) / 4.8e12
    prefill = 64 * 200 * QWEN.flops_per_token(200, output_head=False) / (989e12 * 0.5)
    assert clock.generate(engine_, 249.0, 1, 64, 3000) == pytest.approx(prefill + 900 * full + 2100 * last)
    twice = clock.generate(engine_, 32.0, 1, 64, 3000)  # a cache with room for half of them: two waves
    assert twice == pytest.approx(
        prefill
        + 2 * 900 * (15_231_233_024 + 32 * 57_344 * 650) / 4.8e12
        + 2100 * (15_231_233_024 + 4 * 57_344 * 650) / 4.8e12
    )


def test_parts_of_an_rl_step(repository):
    clock = clock_of(repository, "grpo_qwen2.5-7b_8xh200.yaml")
    (recovery,) = clock.config.recovery
    found = clock.rl_step(QWEN, QWEN, recovery)
    # 1024 answers of 200 + 900 tokens, an eighth on each GPU.
    tokens = 128 * 1100
    assert found["reference"] == found["log-probabilities"] == tokens * QWEN.flops_per_token(550) / (989e12 * 0.5)
    cut = QWEN.sliced(9472, 0)
    assert clock.rl_step(cut, QWEN, recovery)["reference"] < found["reference"]
    to_parent = recovery.model_copy(update={"kl_to": "parent"})
    assert clock.rl_step(cut, QWEN, to_parent)["reference"] == found["reference"]
    again = QWEN.flops_per_token(550, output_head=False)
    assert found["update"] == pytest.approx(tokens * (3 * QWEN.flops_per_token(550) + again) / (989e12 * 0.35))
    padded = clock_of(repository, "grpo_qwen2.5-7b_8xh200.yaml", attention="sdpa").rl_step(QWEN, QWEN, recovery)
    assert padded["update"] / found["update"] == pytest.approx(5048 / 1100)
    bypassed = clock_of(
        repository, "grpo_qwen2.5-7b_8xh200.yaml", "verl={algorithm.rollout_correction.bypass_mode: true}"
    )
    assert bypassed.rl_step(QWEN, QWEN, recovery)["log-probabilities"] == 0


def test_a_smaller_model_is_faster_and_a_slower_gpu_slower(repository):
    clock = clock_of(repository, "grpo_qwen2.5-7b_8xh200.yaml")
    times = clock.run(QWEN, planned_cuts(clock.config.schedule))
    assert [time.stage for time in times[:5]] == ["evaluate", "score", "slice", "recover: grpo", "evaluate"]
    first, last = ([t.seconds for t in times if t.cycle == n] for n in (1, 10))
    assert all(later < earlier for earlier, later in zip(first, last, strict=True))
    slower = dataclasses.replace(clock, planned=dataclasses.replace(clock.planned, device=GPUS["a100-80"]))
    assert sum(t.seconds for t in slower.run(QWEN, planned_cuts(clock.config.schedule))) > sum(t.seconds for t in times)


def test_measuring_the_cut_model_costs_all_of_an_evaluation_but_its_start(repository):
    found = {}
    for told in ("true", "false"):
        clock = clock_of(repository, "grpo_qwen2.5-7b_8xh200.yaml", f"evaluation.after_cut={told}", start_seconds=100)
        times = clock.run(QWEN, planned_cuts(clock.config.schedule))
        found[told] = [time.seconds for time in times if time.stage == "evaluate"]
    assert found["true"][0] == found["false"][0]  # nothing was cut yet
    assert found["true"][1] == pytest.approx(2 * found["false"][1] - 100)


def test_solves_are_those_measured_on_an_h200(repository):
    settings = ["criterion.channels=obs", "schedule.channels_per_cycle=4736", "schedule.channels_total=4736"]
    clock = clock_of(repository, "grpo_qwen2.5-7b_8xh200.yaml", *settings, "schedule.alignment=64")
    plain = clock_of(repository, "grpo_qwen2.5-7b_8xh200.yaml")
    cut = Cut(4736, 0, 0)  # a quarter of 18944, as measured: 2.1 s a block; four blocks on each of eight GPUs
    reading = (3.2 - 1.35) * clock._pass(QWEN, 512)
    assert clock.score(QWEN, cut) - plain.score(QWEN, cut) == pytest.approx(4 * 2.1 + reading)
    assert clock._solve(2.1, QWEN.sliced(channels=9472)) == pytest.approx(2.1 / 8)  # half as wide
    slower = dataclasses.replace(clock, planned=dataclasses.replace(clock.planned, device=GPUS["a100-80"]))
    assert slower._solve(2.1, QWEN) == pytest.approx(2.1 / 0.29)


SEQUENCES = [Sequence([1, 5 + i % 7, 9, 2 + i % 3], 1, 1.0) for i in range(12)]


@pytest.mark.parametrize("moments_gib", [None, 48**2 * 4 * 1.2 / 2**30])
@pytest.mark.parametrize("layer_sequences", [None, 4])
@pytest.mark.parametrize(
    ("channels", "layers", "cut"),
    [
        ("obs", "leave_one_out", engine.Removal(8, 0)),
        ("obs", "leave_one_out", engine.Removal(8, 2)),
        ("activation", "block_influence", engine.Removal(0, 2)),
        ("activation", "explicit", engine.Removal(8, 1)),
    ],
)
def test_scoring_makes_as_many_passes_as_the_engine_does(
    channels, layers, cut, layer_sequences, moments_gib, make_checkpoint
):
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint("llama", num_hidden_layers=5)
    criterion = {"channels": channels, "layers": layers, "layer_sequences": layer_sequences}
    criterion |= {"layer_ids": [3]} if layers == "explicit" else {}
    config = parse_config(
        {
            "schedule": {"channels_per_cycle": [8], "layers_total": cut.layers, "order": "together"},
            "criterion": criterion,
            "calibration": {"sequences": 12, "moments_gib": moments_gib, "batch_size": 4},
        }
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    policy = engine.PrunableModel(model, FAMILIES["llama"], folder, torch.device("cpu"), 4, 0, 1.0, moments_gib)
    read = engine.batches_to_read(policy, CriterionConfig(**criterion), cut, SEQUENCES, [])
    found = score_passes(config, read_shape(folder), Cut(cut.channels, cut.layers, 0), 1)
    batches, judged = 3, -(-(layer_sequences or 12) // 4)
    assert read == (found.channels + found.on_all) * batches + found.judged * judged


def test_constants_are_the_engine_s():
    assert FINALISTS == absorption.FINALISTS


def test_rows_that_nothing_says_are_assumed(repository):
    config = load_config(repository / "recipes/cpt_llama3-8b_4xa100.yaml")
    assert known_rows(config.data.test) == 1319 and known_rows(config.data.validation) == 128
    assert known_rows(config.data.corpus) == 2000


def test_rows_of_sets_that_are_not_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "q", "solution": "s", "answer": "a"}\n' * 400)
    values = {"schedule": {"channels_per_cycle": [1024]}, "model": {"path": "x/y"}}

    def planned(**source):
        return parse_config(values | {"data": {"train": {"path": str(path)} | source}})

    config = planned()
    assert (evaluation_rows(config, "test"), evaluation_rows(config, "validation")) == (60, 20)
    assert unnamed_notes(config) == [
        "data.test and data.validation are not set: some 60 and 20 rows of data.train are held out (data.held_out 0.2)"
    ]
    assert unnamed_notes(planned(rows=100))[0].endswith("; ptl run refuses so few")
    assert evaluation_rows(planned(path="not/here.jsonl"), "test") == 150
    assert unnamed_notes(parse_config(values)) == [
        "data.train is not set, and ptl run refuses that; sizes, memory and disk do not depend on it"
    ]
    assert evaluation_rows(parse_config(values), "test") == 500
    path.write_text(path.read_text() * 100)  # 2 MB, of which the beginning is read
    assert known_rows(config.data.train) == pytest.approx(40_000, rel=0.001)
    assert known_rows(planned(rows=4096).data.train) == 4096
    parquet = tmp_path / "mine.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["q"] * 800}), parquet)
    assert evaluation_rows(planned(path=str(parquet)), "test") == 120


def test_the_demo_takes_minutes_on_cpus(repository):
    config = load_config(repository / "recipes/demo_restart_cpu.yaml")
    shape = read_shape(repository / "ptl_rl/testbed/checkpoints/qwen2")
    device = dataclasses.replace(this_machine(1), teraflops=0.09)
    times = Clock(Planned(config, device, "sdpa"), CPU).run(shape, planned_cuts(config.schedule))
    assert 300 < sum(time.seconds for time in times) < 3600


def test_cuts_in_place_start_nothing_and_train_the_original_width(repository):
    clock = clock_of(repository, "grpo_qwen2.5-7b_8xh200.yaml", "schedule.mode=in_place")
    cuts = planned_cuts(clock.config.schedule)
    times = clock.run(QWEN, cuts)
    steps, save = clock.config.schedule.channel_steps, clock.disk(12 * QWEN.parameters)
    assert len(cuts) == 1 and [time.stage for time in times].count("cut") == len(steps) == 10
    (recovery,) = clock.config.recovery
    first = next(time.seconds for time in times if time.stage == "cut")
    cut, start = Cut(steps[0], 0, 0), clock.assumed.start_seconds
    assert first == pytest.approx(clock.score(QWEN, cut) + clock.slice(QWEN, cut) - 2 * start + save)
    (trained,) = (time.seconds for time in times if time.stage == "recover: grpo")
    total = sum(recovery.steps_of(number) for number in range(10))
    assert trained == clock.rl(QWEN, QWEN, recovery, total)


@pytest.mark.parametrize("recipe", ["grpo_qwen2.5-7b_8xh200.yaml", "cpt_llama3-8b_4xa100.yaml"])
def test_training_that_goes_on_sliced_pays_a_start_and_then_less_for_each_step(recipe, repository):
    def trained(when, steps):
        settings = ["schedule.mode=in_place", f"schedule.rematerialise={when}", "schedule.layers_total=0"]
        settings += ["schedule.channels_total=null", "schedule.channels_per_cycle=[1024,512]"]
        clock = clock_of(repository, recipe, *settings, f"recovery.steps={steps}")
        times = clock.run(shape, planned_cuts(clock.config.schedule))
        return clock, next(time.seconds for time in times if time.stage.startswith("recover"))

    shape = QWEN if recipe.startswith("grpo") else LLAMA
    clock, whole = trained("never", [50, 30])
    (recovery,) = clock.config.recovery
    widths = [shape, shape.sliced(1024), shape.sliced(1536)]
    if recipe.startswith("grpo"):
        parts = [clock.rl_step(width, shape, recovery) for width in widths]
        assert parts[0]["reference"] > parts[1]["reference"] > 0
        # The uncut model that the KL term holds the policy to is read all the while.
        each = [sum(part.values()) - part["reference"] + parts[0]["reference"] for part in parts]
    else:
        each = [clock.cpt_step(width, shape, recovery) for width in widths]
    starts = [clock.assumed.start_seconds + clock.disk(16 * width.parameters) for width in widths[1:]]
    starts = [start + clock.assumed.engine_start_seconds * recipe.startswith("grpo") for start in starts]
    _, sliced = trained("after_every_cut", [50, 30])
    told = each[0] + 49 * each[1] + 30 * each[2] + sum(starts)
    assert sliced - whole == pytest.approx(told - 80 * each[0])
    assert trained("when_it_pays", [1, 1])[1] == trained("never", [1, 1])[1] < trained("after_every_cut", [1, 1])[1]
    gain = 5049 * (each[0] - each[1]) - starts[0] + 5000 * (each[1] - each[2]) - starts[1]
    assert trained("never", [50, 5000])[1] - trained("when_it_pays", [50, 5000])[1] == pytest.approx(gain)


def test_the_policy_as_each_cut_leaves_it_is_written_and_the_last_one_sliced(repository):
    cut, sliced = {}, {}
    for told in ("true", "false"):
        settings = ["schedule.mode=in_place", f"evaluation.after_cut={told}"]
        clock = clock_of(repository, "grpo_qwen2.5-7b_8xh200.yaml", *settings)
        times = clock.run(QWEN, planned_cuts(clock.config.schedule))
        cut[told], sliced[told] = (next(t.seconds for t in times if t.stage == name) for name in ("cut", "slice"))
    assert cut["true"] - cut["false"] == pytest.approx(clock.disk(4 * QWEN.parameters))
    left = QWEN.sliced(channels=clock.config.schedule.channels_sum)
    assert sliced["true"] - sliced["false"] == pytest.approx(clock.disk(4 * (QWEN.parameters + left.parameters)))
