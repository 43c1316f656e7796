"""Memory of the phases, against numbers worked out by hand for 7 B on eight H200s and 8 B on four A100s."""

import dataclasses

import pytest

from ptl_rl.checkpoints.write import MAX_FILE_BYTES as WRITTEN_FILE_BYTES
from ptl_rl.config.recipe import load_config, parse_config
from ptl_rl.families import FAMILIES, shape_from_config
from ptl_rl.families.published import PUBLISHED
from ptl_rl.planning.hardware import GIB, GPUS
from ptl_rl.planning.memory import MAX_FILE_BYTES, Planned, phases
from ptl_rl.planning.pruning_memory import Pruner
from ptl_rl.planning.schedule import Cut, planned_cuts
from ptl_rl.planning.trainer_memory import Rows, Trainer, total

FLASH = "flash_attention_2"


def shape_of(name):
    return shape_from_config(PUBLISHED[name], FAMILIES, name)


QWEN, LLAMA, GEMMA = map(shape_of, ("Qwen/Qwen2.5-7B", "meta-llama/Meta-Llama-3-8B", "google/gemma-2-9b"))


def planned_of(repository, name, *settings, gpu=None, attention=FLASH):
    config = load_config(repository / "recipes" / name, list(settings))
    return Planned(config, GPUS[gpu or config.resources.gpu], attention)


def phase(planned, shape, name):
    return next(p for p in phases(planned, shape, planned_cuts(planned.config.schedule)) if p.name == name)


def test_an_update_of_7b_on_eight_gpus():
    parts = Trainer(QWEN, 8, 2, FLASH).update(Rows(20192, 5048))  # four sequences of 2048 + 3000 tokens
    # 7,615,616,512 parameters, 951,952,064 on each GPU: 4, 8 and 4 bytes.
    assert parts["parameters"] == 3_807_808_256
    assert parts["optimizer"] == 7_615_616_512
    assert parts["gradients"] == 3_807_808_256
    # The output embedding, 152064 x 3584 = 544,997,376, is more than three blocks of 233,057,792: it and its buffer in
    # bfloat16, 2,179,989,504; its gradient in bfloat16 and float32, 6 x 544,997,376 = 3,269,984,256.
    assert parts["gathered"] == 2_179_989_504 + 3_269_984_256
    # Streams: 2 x 3584 x 28 a token. In a block 8 x 3584 for each of two norms, 2 x (2 x 3584 + 2 x 512) of attention,
    # 2 x (2 x 3584 + 4 x 18944) of streams and the FFN: 239,616 a token; gradients in the FFN: 2 x 3 x 18944.
    assert parts["activations"] == 20192 * (200_704 + 239_616 + 113_664) == 11_186_044_928
    assert "logits" not in parts and total(parts) == 31_867_251_712  # the loss takes less: below


def test_the_loss_takes_more_where_the_vocabulary_and_the_batch_are_large():
    small = dataclasses.replace(QWEN, num_hidden_layers=1, intermediate_size=1024)
    parts = Trainer(small, 8, 2, FLASH).update(Rows(20192, 5048))
    assert parts["logits"] == 20192 * 152064 * 2 == 6_140_952_576  # flash-attn's kernel works in place
    # The output embedding and its buffer, and its gradient, in bfloat16.
    assert parts["gathered"] == 3 * 2 * 544_997_376
    padded = Trainer(small, 8, 2, "sdpa").update(Rows(20192, 5048))
    # The copy without padding, the gradients of its chunks, and these put together; a chunk's own 3.5 float32 tensors.
    assert padded["logits"] == 3 * 6_140_952_576 + 14 * 1024 * 152064


def test_continued_pretraining_of_8b_on_four_gpus(repository):
    found = phase(planned_of(repository, "cpt_llama3-8b_4xa100.yaml"), LLAMA, "recover: cpt")
    # The first cut leaves 13312 channels: 8,030,261,248 - 32 x 3 x 4096 x 1024 = 7,627,608,064, a quarter of them here.
    assert found.cycle == 1
    assert found.parts["parameters"] == found.parts["gradients"] == 7_627_608_064
    assert found.parts["optimizer"] == 15_255_216_128
    # As ZeRO 2 all in bfloat16, a block's buffer (205,529,088 x 2), and the head's gradient (525,336,576 x 6).
    assert found.parts["gathered"] == 2 * (7_627_608_064 + 205_529_088) + 3_152_019_456
    # 8192 tokens: 2 x 4096 x 32 of streams, 65,536 + 20,480 + 122,880 in a block, 2 x 3 x 13312 on their way back.
    assert found.parts["activations"] == 8192 * (262_144 + 208_896 + 79_872) == 4_513_071_104
    assert found.bytes == 53_841_797_120 + 2 * GIB  # with CUDA and NCCL: 52.1 GiB of 79.1
    # While it loads rank 0 holds all in float32, then every GPU's process writes a file of 5 GiB at most; 3 GiB each.
    assert found.host == 4 * 7_627_608_064 + 12 * GIB


def test_a_policy_is_sliced_beside_what_it_is_sliced_from(repository):
    settings = ["schedule.mode=in_place", "schedule.rematerialise=after_every_cut", "schedule.layers_total=0"]
    settings.append("recovery=[{cpt: {steps: [50, 50], parent_kl: 1.0}}]")
    planned = planned_of(repository, "cpt_llama3-8b_4xa100.yaml", *settings)
    found = phase(planned, LLAMA, "slice in place")
    # 8,030,261,248 parameters on four GPUs, 12 bytes each; without the embeddings, 128256 x 4096 = 525,336,576, which
    # are not sliced, as much again; the parent in bfloat16, a quarter, with both embeddings whole.
    assert found.parts["optimizer"] == 3 * 8_030_261_248
    assert found.parts["sliced"] == 3 * (8_030_261_248 - 525_336_576)
    assert found.parts["parent"] == 2 * (8_030_261_248 / 4 + 2 * 525_336_576)
    assert found.parts["projection"] == 8 * 4096 * 14336
    assert phase(planned, LLAMA, "score").parts["parent"] == found.parts["parent"]
    offloaded = planned_of(
        repository, "cpt_llama3-8b_4xa100.yaml", *settings[:3], "recovery=[{cpt: {steps: [50, 50], offload: true}}]"
    )
    moved = phase(offloaded, LLAMA, "slice in place")
    assert moved.parts["optimizer"] == moved.parts["sliced"] == 0 and "parent" not in moved.parts
    assert moved.host > 12 * (8_030_261_248 - 525_336_576)  # of all four, on the node
    never = planned_of(repository, "cpt_llama3-8b_4xa100.yaml", *settings[:1], "schedule.layers_total=0", settings[-1])
    assert "slice in place" not in [p.name for p in phases(never, LLAMA, planned_cuts(never.config.schedule))]


def test_what_is_for_dead_rewards_trains_the_sliced_model(repository):
    name = "grpo_qwen2.5-7b_8xh200.yaml"
    rescue = "recovery_if_unlearnable=[{cpt: {steps: 9, max_tokens: 2048}}]"
    planned = planned_of(
        repository, name, "schedule={mode: in_place, channels_per_cycle: [1024]}", rescue,
        "recovery=[{grpo: {steps: 4, min_learnable_fraction: 0.1}}]",
    )  # fmt: skip
    assert phase(planned, QWEN, "recover: cpt").parts["parameters"] == 4 * QWEN.sliced(1024).parameters / 8


def test_every_rank_loads_a_model_with_tied_embeddings_whole(repository):
    found = phase(planned_of(repository, "cpt_gemma2-9b_4xa100.yaml"), GEMMA, "recover: cpt")
    after = GEMMA.sliced(channels=1024)
    assert found.host == 4 * 4 * after.parameters + 12 * GIB


def test_rollouts_of_7b_share_a_gpu_with_a_trainer_that_is_offloaded(repository):
    planned = planned_of(repository, "grpo_qwen2.5-7b_8xh200.yaml")
    found = phase(planned, QWEN, "grpo: rollouts")
    # 60 % of 139.8 GiB; weights 2 x 7,307,335,168 after the first cut.
    assert found.parts["vLLM weights"] == 14_614_670_336
    # A pass of 8192 tokens: 2 x (4 x 3584 + 3 x 17920) each; the sampler: 256 x 152064 x 12 bytes; graphs 1.5 GiB.
    work = 8192 * 2 * (14_336 + 53_760) + 12 * 256 * 152064 + 1.5 * GIB
    assert found.parts["vLLM work"] == work
    cache = 0.6 * 139.8 * GIB - 14_614_670_336 - work
    assert found.parts["KV cache"] == pytest.approx(cache)
    # Keys and values: 2 x 2 bytes x 28 blocks x 4 heads x 128 = 57,344 a token, 5048 tokens a sequence.
    assert found.room == pytest.approx(cache / (57_344 * 5048)) and int(found.room) == 249
    assert "parameters" not in found.parts
    # Offloaded: 12 bytes of weights and moments, 4 of the reference, 4 of the file in writing, 3 GiB a GPU.
    assert found.host == 20 * 7_307_335_168 + 24 * GIB
    kept = phase(planned_of(repository, "grpo_qwen2.5-7b_8xh200.yaml", "recovery.offload=false"), QWEN, found.name)
    assert kept.bytes - found.bytes == pytest.approx(12 * 7_307_335_168 / 8)


def test_a_reference_that_is_the_parent_has_the_parents_size(repository):
    name, set_ = "grpo_qwen2.5-7b_8xh200.yaml", "recovery.kl_to=parent"
    (own, parent) = (phase(planned_of(repository, name, *given), QWEN, "grpo: reference") for given in ((), (set_,)))
    after = QWEN.sliced(planned_of(repository, name).config.schedule.channels_per_cycle, 0)
    assert parent.host - own.host == 4 * (QWEN.parameters - after.parameters) > 0
    assert parent.parts["activations"] > own.parts["activations"] and parent.parts["logits"] == own.parts["logits"]


def test_log_probabilities_with_and_without_flash_attention():
    trainer, rows = Trainer(QWEN, 8, 2, FLASH), Rows(20192, 5048)
    assert trainer.read(rows, optimizer=False, entropy=True)["logits"] == 2 * 20192 * 152064
    padded = Trainer(QWEN, 8, 2, "sdpa").read(rows, optimizer=True, entropy=True)
    assert padded["logits"] == 10 * 20192 * 152064  # the entropy's softmax and its product, in float32
    assert padded["optimizer"] == 8 * 951_952_064
    alone = Trainer(QWEN, 8, 2, "sdpa").read(rows, optimizer=True)
    assert alone["logits"] == 4 * 20192 * 152064 + 8 * 1024 * 152064


def test_tied_embeddings_stay_whole():
    # 256000 x 3584 and three blocks of 198,195,200 in bfloat16; on one worker no block is fetched ahead.
    assert Trainer(GEMMA, 4, 2, FLASH).gathered() == 2 * (917_504_000 + 3 * 198_195_200)
    assert Trainer(GEMMA, 1, 4, "eager").gathered() == 4 * (917_504_000 + 198_195_200)


def test_eager_attention_keeps_its_scores():
    rows = Rows(4096, 1024)
    eager, sdpa = (Trainer(GEMMA, 4, 2, name).activations(rows) for name in ("eager", "sdpa"))
    assert eager - sdpa == 14 * 16 * 4096 * 1024


def test_without_checkpointing_every_block_is_kept():
    rows = Rows(1000, 500)
    with_, without = (Trainer(LLAMA, 4, 2, FLASH, checkpointing=c) for c in (True, False))
    block = with_.block_activations(rows)
    assert without.activations(rows) - with_.activations(rows) == 31 * block - 2 * 4096 * 32 * 1000


def pruner(workers=8, **values):
    config = parse_config({"schedule": {"channels_per_cycle": [1024]}, **values})
    return Pruner(config, workers, 2, FLASH)


def test_second_moments_are_shared_out_by_block():
    # A matrix of 18944 channels: 18944^2 x 4 = 1,435,500,544. Of 28 blocks four are this rank's, and one is on its way.
    found = pruner(calibration={"batch_size": 1, "max_tokens": 8}).score(QWEN, Cut(1024, 0, 0))
    assert pruner().matrices(QWEN) == 4
    solving = 6 * 8 * 28 * 18944 + 4 * 1_435_500_544 + 32 * 18944**2  # statistics, matrices, the inverse and its kin
    assert found["sums"] == solving
    few = pruner(calibration={"batch_size": 1, "max_tokens": 8, "moments_gib": 3})
    assert few.matrices(QWEN) == 2 and found["sums"] - few.score(QWEN, Cut(1024, 0, 0))["sums"] == 2 * 1_435_500_544
    # A share of 7,615,616,512 / 8 in bfloat16; both embeddings and three blocks whole.
    assert found["parameters"] == 1_903_904_128
    assert found["gathered"] == 2 * (2 * 544_997_376 + 3 * 233_057_792)


def test_simple_criteria_hold_vectors_only():
    found = pruner(criterion={"channels": "activation", "compensate": "none"}).score(QWEN, Cut(1024, 0, 0))
    assert found["sums"] == 6 * 8 * 28 * 18944


def test_sensitivity_costs_a_backward_pass():
    criterion = {"channels": "activation", "compensate": "none"}
    plain = pruner(criterion=criterion).score(QWEN, Cut(1024, 0, 0))
    weighed = pruner(criterion=criterion, calibration={"token_weights": "sensitivity"}).score(QWEN, Cut(1024, 0, 0))
    assert weighed["logits"] == 14 * 16 * 512 * 152064 and weighed["activations"] > 10 * plain["activations"]


def test_compensation_holds_two_streams_and_one_matrix():
    found = pruner(calibration={"sequences": 1024, "max_tokens": 1024}).compensate(QWEN, Cut(1024, 0, 0))
    # 131,072 tokens a rank, 3584 wide, twice, in bfloat16: 1.9 GB.
    assert found["streams"] == 2 * 2 * 3584 * 131_072 == 1_879_048_192
    # The matrix and what it is regressed on, 4 x 18944 x (18944 + 3584); the solve in float64.
    assert found["sums"] == 4 * 18944 * 22528 + 20 * 18944**2 + 24 * 18944 * 3584


def test_the_micro_batch_is_what_the_stage_renders(repository):
    name = "grpo_qwen2.5-7b_8xh200.yaml"
    planned = planned_of(repository, name)
    (recovery,) = planned.config.recovery
    assert planned.rows(recovery) == Rows(4 * 5048, 5048)  # 128 sequences a GPU, four of full length at once
    padded = planned_of(repository, name, "recovery.micro_batch_sequences=5", attention="sdpa")
    assert padded.rows(padded.config.recovery[0]) == Rows(4 * 5048, 5048)  # of 128, five is no divisor
    unpadded = planned_of(repository, name, "recovery.micro_batch_sequences=5")
    assert unpadded.rows(unpadded.config.recovery[0]) == Rows(5 * 5048, 5048)
    llama = planned_of(repository, "cpt_llama3-8b_4xa100.yaml", "recovery.0.cpt.micro_batch_tokens=32768")
    assert llama.rows(llama.config.recovery[0]) == Rows(8192, 1024)  # a GPU has eight sequences of a step


def test_a_parent_that_teaches_has_gpus_of_its_own(repository):
    config = load_config(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml").model_dump()
    config["recovery"] = [{"method": "distill", "prompts_per_step": 126, "teacher_workers_per_node": 2}]
    planned = Planned(parse_config(config), GPUS["h200"], FLASH)
    found = phase(planned, QWEN, "distill: update")
    assert found.parts["parameters"] == pytest.approx(4 * 7_307_335_168 / 6)
    teacher = phase(planned, QWEN, "distill: teacher")
    assert teacher.parts["vLLM weights"] == 2 * 7_615_616_512 and total(teacher.parts) == pytest.approx(
        0.8 * 139.8 * GIB
    )


def test_a_parent_beside_the_policy(repository):
    name, kl = "cpt_llama3-8b_4xa100.yaml", "recovery.0.cpt.parent_kl=0.5"
    found = phase(planned_of(repository, name, kl), LLAMA, "recover: cpt")
    # A quarter of it, both embeddings and two blocks in bfloat16; 8192 tokens' logits twice; four float32 chunks.
    share = 2 * (8_030_261_248 // 4 + 2 * 525_336_576 + 2 * 218_112_000)
    assert found.parts["parent"] == share + 4 * 8192 * 128256 + 16 * 1024 * 128256


def test_files_are_as_large_as_they_are_written():
    assert MAX_FILE_BYTES == WRITTEN_FILE_BYTES
