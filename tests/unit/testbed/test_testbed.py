"""Generators are seeded, their splits share nothing, and their solutions are right."""

import itertools
import json
import random
import re
from functools import partial

import pytest
import torch
from pretrain_testbed import JUMPS, QUESTION_WEIGHT, add_blocks, batches, history, jump_share, train

from ptl_rl.config import ConfigError
from ptl_rl.models import resolve_model
from ptl_rl.testbed import problem as problem_module
from ptl_rl.testbed import programs, shipped_checkpoint, word_problems
from ptl_rl.testbed.problem import EASY, LEVELS, SPLITS, Problem, split_of
from ptl_rl.testbed.tiny_models import FAMILIES, tiny_model
from ptl_rl.testbed.tokenizer import build_tokenizer
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


def masked(problem, generator):
    """A question without names, items, distractors and the names of functions: what is left decides the computation."""
    text = problem.question
    if generator is programs:
        return re.sub(r"^Write \w+\(", "Write f(", text)
    names, items = "|".join(word_problems.NAMES), "|".join(word_problems.ITEMS)
    distractor = re.match(rf"(\w+) has \d+ ({items})\. (?=.)", text)
    if distractor and not re.search(rf"\b({distractor[1]}|{distractor[2]})\b", text[distractor.end() :]):
        text = text[distractor.end() :]
    known = {}

    def placeholder(word):
        return known.setdefault(word[0], f"<{len(known)}>")

    return re.sub(rf"\b(?:{names}|{items})\b", placeholder, text)


@pytest.fixture(scope="module")
def drawn():
    """100 thousand problems of a generator, all levels and splits, drawn once."""
    kept = {}

    def of(generator):
        if generator not in kept:
            rng, found = random.Random(7), []
            while len(found) < 100_000:
                problem = generator._draw(rng, rng.choice(LEVELS))
                if problem is not None:
                    found.append(problem)
            kept[generator] = found
        return kept[generator]

    yield of
    kept.clear()


def in_two_splits(problems, key, another):
    """How often a key stands for problems that ``another`` tells apart, and the keys that stand in several splits."""
    splits, others = {}, {}
    for problem in problems:
        found = key(problem)
        splits.setdefault(found, set()).add(split_of(problem.form))
        others.setdefault(found, set()).add(another(problem))
    assert {split for found in splits.values() for split in found} == set(SPLITS)
    return sum(len(found) > 1 for found in others.values()), [key for key, found in splits.items() if len(found) > 1]


@GENERATORS
def test_no_problem_stands_in_two_splits_in_other_words(generator, drawn):
    """Whatever the names; the question's own text says so, not the form that the split is of."""
    twins, leaks = in_two_splits(drawn(generator), partial(masked, generator=generator), lambda p: p.question)
    assert twins > 1000 and leaks == []  # there is something to find


def steps(problem):
    """The lines of a solution in any order, with summands and factors in any order."""
    lines = [line.split() for line in problem.solution.split("\n")[:-1]]
    return tuple(sorted((sign, *(sorted((a, b)) if sign in "+*" else (a, b))) for a, sign, b, _, _ in lines))


def test_no_word_problem_stands_in_two_splits_with_its_numbers_in_other_places(drawn):
    def is_clear(problem):  # else the lines do not tell which of two equal numbers is meant
        return not set(re.findall(r"= (\d+)", problem.solution)) & set(re.findall(r"\d+", problem.question))

    twins, leaks = in_two_splits(filter(is_clear, drawn(word_problems)), steps, lambda problem: problem.solution)
    assert twins > 1000 and leaks == []


def test_a_word_problem_is_its_answers_expression():
    def form(compute):
        return word_problems._image(compute(word_problems._Working()))

    def of_sum(work):
        return work.mul(work.add(9, 7), 5)

    def swapped(work):
        return work.mul(5, work.add(7, 9))

    def spread(work):
        return work.add(work.mul(9, 5), work.mul(7, 5))

    def later(work):  # bought before it was lost
        return work.sub(work.add(20, 6), 4), work.add(work.sub(20, 4), 6)

    def shared(work):
        return work.div(work.add(3, 9), 4), work.div(work.add(9, 3), 4), work.div(work.add(5, 7), 4)

    assert form(of_sum) == form(swapped) == form(spread)
    assert form(lambda work: later(work)[0]) == form(lambda work: later(work)[1])
    assert form(lambda work: shared(work)[0]) == form(lambda work: shared(work)[1]) != form(lambda w: shared(w)[2])
    others = [lambda w: w.sub(9, 7), lambda w: w.sub(7, 9), lambda w: w.add(9, 7), lambda w: w.add(10, 6)]
    others += [lambda w: w.mul(9, 7), lambda w: w.div(63, 9), lambda w: w.div(9, 63), of_sum]
    assert len({form(compute) for compute in others}) == len(others)


def numbers(seed):
    rng = random.Random(seed)
    return [rng.randint(0, 30) for _ in range(5 + seed % 4)]


WIDE = {
    "xs": [*programs.PROBES["xs"], *map(numbers, range(40))],
    "s": programs.WORDS,
    "x": range(46),
    "n": range(6, 26),
}


def behaviour(problem):
    """What the shown program gives for the probes and many other inputs: run, not worked out."""
    names = {}
    exec(problem.solution.removeprefix("```python\n").removesuffix("\n```"), names)
    function = names[re.match(r"Write (\w+)", problem.question)[1]]
    argument = function.__code__.co_varnames[0]
    results = [argument]
    for value in WIDE[argument]:
        try:
            results.append(repr(function(value)))
        except ValueError:
            results.append("error")
    return hash(tuple(results))


def test_no_program_stands_in_two_splits_written_otherwise(drawn):
    problems = drawn(programs)[:20_000]
    twins, leaks = in_two_splits(problems, behaviour, lambda problem: problem.solution.split("\n", 2)[2])
    assert twins > 200 and leaks == []


@GENERATORS
def test_a_stream_has_no_problem_twice_and_only_its_own(generator):
    for split in SPLITS:
        found = take(split, 400, 5, generator)
        assert len({problem.form for problem in found}) == len({problem.id for problem in found}) == 400
        assert all(split_of(problem.form) == split and problem.level in EASY for problem in found)


@GENERATORS
def test_every_template_appears_in_every_level(generator):
    for level in LEVELS:
        found = list(itertools.islice(generator.problems("pretrain", 0, [level]), 300))
        assert {problem.template for problem in found} == set(generator.TEMPLATES)
        assert {problem.level for problem in found} == {level}


def test_no_more_problems_than_there_are(monkeypatch):
    monkeypatch.setattr(problem_module, "EXHAUSTED", 2000)

    def draw(rng, level):
        return Problem("", "", "", "", level, "", str(rng.randint(0, 40)))

    with pytest.raises(ValueError, match=r"the split 'rl' has no more than \d problems of levels \[1, 2, 3\]; ask"):
        list(problem_module.distinct(draw, "rl", 0))
    with pytest.raises(ValueError, match="unknown level among"):
        next(word_problems.problems("rl", 0, [6]))


def test_programs_pass_their_tests_and_others_do_not():
    sample = list(itertools.islice(programs.problems("test", 0, LEVELS), 60))
    assert all(code_reward(p.solution, p.answer) == 1.0 for p in sample)
    nothing = "```python\ndef {}(_):\n    return None\n```"
    assert not any(
        code_reward(nothing.format(p.question.split("(")[0].removeprefix("Write ")), p.answer) for p in sample[:20]
    )


def test_solutions_are_right():
    for problem in itertools.islice(word_problems.problems("test", 0, LEVELS), 1500):
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


def test_questions_weigh_little_and_padding_nothing():
    tokenizer = build_tokenizer(sample_problems=200)
    ids_BT, weights_BT = next(batches(tokenizer, 8, 0, "words", hard_share=0.5))
    assert ids_BT.shape == weights_BT.shape and len(ids_BT) == 8
    for ids, weights in zip(ids_BT, weights_BT, strict=True):
        answer = tokenizer.decode(ids[weights == 1])
        assert "\\boxed{" in answer and answer.endswith("<|im_end|>")
        assert tokenizer.decode(ids[weights == torch.tensor(QUESTION_WEIGHT)]).startswith("<|im_start|>user\n")
        assert set(ids[weights == 0].tolist()) <= {tokenizer.pad_token_id}


def test_some_solutions_of_long_chains_are_the_answer_alone():
    tokenizer = build_tokenizer(sample_problems=200)
    stream = batches(tokenizer, 16, 0, "words", hard_share=1.0)
    responses = [
        tokenizer.decode(ids[weights == 1])
        for pair in itertools.islice(stream, 16)  # all lengths
        for ids, weights in zip(*pair, strict=True)
    ]
    alone = sum(text.startswith("\\boxed{") for text in responses) / len(responses)
    assert alone == pytest.approx(sum(low + high for low, high in JUMPS.values()) / 4, abs=0.1)
    shares = {(p.level, p.template): jump_share(p) for level in LEVELS for p in taken(level, 200)}
    assert {shares[level, name] for level in EASY for name in word_problems.TEMPLATES} == {0}
    for level, limits in JUMPS.items():
        of_level = [shares[level, name] for name in word_problems.TEMPLATES]
        assert (min(of_level), max(of_level)) == pytest.approx(limits) and of_level == sorted(of_level)


def taken(level, count):
    return itertools.islice(word_problems.problems("pretrain", 0, [level]), count)


def test_a_dropped_block_learns_nothing_in_that_step():
    model = tiny_model("llama", num_hidden_layers=3, hidden_size=32, intermediate_size=48)
    before = [block.mlp.down_proj.weight.clone() for block in model.model.layers]
    ids_BT = torch.arange(24).view(2, 12)
    loss = train(model, iter([(ids_BT, torch.ones(2, 12))]), 1, 1e-2, block_drop=1.0)
    changed = [not torch.equal(b.mlp.down_proj.weight, w) for b, w in zip(model.model.layers, before, strict=True)]
    assert sum(changed) == 2 and 4 < loss < 8  # about the log of 512 tokens
    train(model, iter([(ids_BT, torch.ones(2, 12))]), 1, 1e-2)
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
    of_shipped = json.loads((shipped_checkpoint("testbed") / "pretraining.json").read_text())
    assert found["continued_from"] == of_shipped and of_shipped["family"] == "qwen2"


def test_blocks_are_only_added_where_there_are_fewer():
    with pytest.raises(ValueError, match="the model has 2 blocks, 2 are asked for"):
        add_blocks(tiny_model("llama", num_hidden_layers=2), 2)
