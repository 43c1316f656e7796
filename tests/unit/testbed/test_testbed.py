"""The generator is seeded, its splits share nothing, and its solutions are right."""

import itertools
import re

import pytest

from ptl_rl.testbed import CHECKPOINT_DIR
from ptl_rl.testbed.word_problems import LEVELS, SPLITS, TEMPLATES, problems, split_of


def take(split, count, seed=0):
    return list(itertools.islice(problems(split, seed), count))


def test_streams_are_seeded():
    assert take("rl", 50, seed=1) == take("rl", 50, seed=1)
    assert take("rl", 50, seed=1) != take("rl", 50, seed=2)
    with pytest.raises(ValueError, match="there are pretrain, rl, validation, test"):
        problems("nowhere").__next__()


def test_splits_share_no_question():
    questions = {split: {p.question for p in take(split, 600, seed=5)} for split in SPLITS}
    assert all(len(found) == 600 for found in questions.values())
    assert len(set().union(*questions.values())) == 600 * len(SPLITS)
    assert all(split_of(q) == split for split, found in questions.items() for q in found)


def test_every_template_and_level_appears():
    assert {(p.template, p.level) for p in take("pretrain", 1500)} == set(itertools.product(TEMPLATES, LEVELS))


def test_solutions_are_right():
    for problem in take("test", 800):
        *lines, box = problem.solution.split("\n")
        for line in lines:
            left, sign, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", line).groups()
            a, b, c = int(left), int(right), int(result)
            assert {"+": a + b, "-": a - b, "*": a * b}.get(sign) == c or (sign == "/" and b * c == a), line
        assert box == f"\\boxed{{{problem.answer}}}" and lines[-1].endswith(f"= {problem.answer}")


def test_shipped_checkpoint_is_small_and_safe():
    assert (CHECKPOINT_DIR / "model.safetensors").stat().st_size <= 8 * 1000 * 1000
    assert not [p for p in CHECKPOINT_DIR.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
