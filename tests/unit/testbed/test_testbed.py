"""Generators are seeded, their splits share nothing, and their solutions are right."""

import itertools
import json
import re

import pytest
import torch
from pretrain_testbed import add_blocks, history, train

from ptl_rl.config import ConfigError
from ptl_rl.models import resolve_model
from ptl_rl.testbed import programs, shipped_checkpoint, word_problems
from ptl_rl.testbed.problem import LEVELS, SPLITS, split_of
from ptl_rl.testbed.tiny_models import FAMILIES, tiny_model
from reward.programs.reward import code_reward

GENERATORS = pytest.mark.parametrize("generator", [word_problems, programs], ids=["words", "programs"])


def take(split, count, seed=0, generator=word_problems):
    return list(itertools.islice(generator.problems(split, seed), count))


@GENERATORS
def test_streams_are_seeded(generator):
    assert take("rl", 50, 1, generator) == take("rl", 50, 1, generator)
    assert take("rl", 50, 1, generator) != take("rl", 50, 2, generator)
    with pytest.raises(ValueError, match="there are pretrain, rl, validation, test"):
        generator.problems("nowhere").__next__()


@GENERATORS
def test_splits_share_no_question(generator):
    questions = {split: {p.question for p in take(split, 600, 5, generator)} for split in SPLITS}
    assert all(len(found) == 600 for found in questions.values())
    assert len(set().union(*questions.values())) == 600 * len(SPLITS)
    assert all(split_of(q) == split for split, found in questions.items() for q in found)


@GENERATORS
def test_every_template_and_level_appears(generator):
    found = {(p.template, p.level) for p in take("pretrain", 1500, generator=generator)}
    assert found == set(itertools.product(generator.TEMPLATES, LEVELS))


def test_programs_pass_their_tests_and_others_do_not():
    sample = take("test", 60, generator=programs)
    assert all(code_reward(p.solution, p.answer) == 1.0 for p in sample)
    nothing = "```python\ndef {}(_):\n    return None\n```"
    assert not any(
        code_reward(nothing.format(p.question.split("(")[0].removeprefix("Write ")), p.answer) for p in sample[:20]
    )


def test_solutions_are_right():
    for problem in take("test", 800):
        *lines, box = problem.solution.split("\n")
        for line in lines:
            left, sign, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", line).groups()
            a, b, c = int(left), int(right), int(result)
            assert {"+": a + b, "-": a - b, "*": a * b}.get(sign) == c or (sign == "/" and b * c == a), line
        assert box == f"\\boxed{{{problem.answer}}}" and lines[-1].endswith(f"= {problem.answer}")


@pytest.mark.parametrize(
    "name", ["testbed", "testbed:qwen2", "testbed:qwen2-deep", "testbed:llama", "testbed:gemma2", "testbed:programs"]
)
def test_shipped_checkpoints_are_small_safe_and_of_their_family(name):
    folder = shipped_checkpoint(name)
    assert (folder / "model.safetensors").stat().st_size <= 8 * 1000 * 1000
    assert not [p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    family = name.partition(":")[2].partition("-")[0] or "qwen2"
    family = "llama" if family == "programs" else family
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    assert json.loads((folder / "pretraining.json").read_text())["family"] == family


def test_what_is_not_shipped_is_refused_with_what_is(tmp_path):
    assert shipped_checkpoint("org/testbed") is None
    for name in ("testbed:mistral", "testbed:", "testbed:.."):
        with pytest.raises(
            ConfigError, match=r"model\.path: testbed:.*; there are testbed:gemma2, testbed:llama, testbed:p"
        ):
            resolve_model(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_added_blocks_change_nothing_at_first_and_can_learn(family):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": 1, "pad_token_id": 0}
    small, ids_BT = tiny_model(family, num_hidden_layers=2, **sizes), torch.arange(24).view(2, 12)
    grown = add_blocks(small, 3)
    assert grown.config.model_type == small.config.model_type and len(grown.model.layers) == 3
    logits = grown(ids_BT).logits
    assert torch.equal(logits, small(ids_BT).logits)
    logits.square().mean().backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for p in grown.model.layers[2].parameters())


def test_a_dropped_block_learns_nothing_in_that_step():
    model = tiny_model("llama", num_hidden_layers=3, hidden_size=32, intermediate_size=48)
    before = [block.mlp.down_proj.weight.clone() for block in model.model.layers]
    ids_BT = torch.arange(24).view(2, 12)
    loss = train(model, iter([(ids_BT, ids_BT)]), 1, 1e-2, block_drop=1.0)
    changed = [not torch.equal(b.mlp.down_proj.weight, w) for b, w in zip(model.model.layers, before, strict=True)]
    assert sum(changed) == 2 and 4 < loss < 8  # about the log of 512 tokens
    train(model, iter([(ids_BT, ids_BT)]), 1, 1e-2)
    assert all(not torch.equal(b.mlp.down_proj.weight, w) for b, w in zip(model.model.layers, before, strict=True))


def test_the_record_goes_back_over_cuts(tmp_path):
    assert history(tmp_path) == {"folder": tmp_path.name}
    plan = {"keep_channels": [[0, 2], [1, 2]], "keep_layers": [0, 1], "layer_order": [], "alignment": 1}
    plan |= {"source_intermediate_size": 3, "channel_criterion": "random", "layer_criterion": "explicit"}
    (tmp_path / "plan.json").write_text(
        json.dumps({**plan, "subset_hash": "", "source": str(shipped_checkpoint("testbed"))})
    )
    found = history(tmp_path)
    assert found["sliced_to"] == {"intermediate_size": 2, "layers": 2}
    assert found["continued_from"]["greedy_accuracy_validation_500"] == 0.944


def test_blocks_are_only_added_where_there_are_fewer():
    with pytest.raises(ValueError, match="the model has 2 blocks, 2 are asked for"):
        add_blocks(tiny_model("llama", num_hidden_layers=2), 2)
