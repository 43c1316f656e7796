"""Seeded small programming problems: the question in words, the Python function in a fenced block, unit tests.

They stand in for MBPP on the test bed. What the tests expect is computed from the meaning of each step, never by
running the program that the solution shows.
"""

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ptl_rl.testbed.problem import EASY, Problem, distinct, hash_of, id_of

FUNCTIONS = ("f", "g", "solve", "work", "pick", "make", "change", "count_up")
WORDS = "apple bread candle dinner engine forest garden hammer island jacket kitten ladder meadow needle orange".split()  # noqa: SIM905
TESTS = 3
INPUTS: dict[str, Callable[[random.Random], Any]] = {
    "xs": lambda rng: [rng.randint(0, 30) for _ in range(rng.randint(5, 8))],
    "s": lambda rng: rng.choice(WORDS),
    "x": lambda rng: rng.randint(0, 45),
    "n": lambda rng: rng.randint(6, 25),
}
"""What a function is called with, by the name of its argument."""
PROBES = {argument: [draw(random.Random(seed)) for seed in range(12)] for argument, draw in INPUTS.items()}
"""Inputs whose results say what a program does; some come twice. Programs that differ on other inputs count as one."""


@dataclass(frozen=True)
class _Step:
    """One thing that a program does, in words, in Python, and as what it means."""

    words: str
    line: str
    apply: Callable[[Any], Any]


@dataclass(frozen=True)
class _Draft:
    argument: str
    words: list[str]
    lines: list[str]
    apply: Callable[[Any], Any]


def _in_turn(steps: list[_Step]) -> Callable[[Any], Any]:
    def apply(value: Any) -> Any:
        for step in steps:
            value = step.apply(value)
        return value

    return apply


def _list_step(rng: random.Random) -> _Step:
    k = rng.randint(2, 20)
    few = k % 5 + 1
    steps = (
        _Step("keep the even numbers", "xs = [x for x in xs if x % 2 == 0]", lambda xs: [x for x in xs if not x & 1]),
        _Step("keep the odd numbers", "xs = [x for x in xs if x % 2 == 1]", lambda xs: [x for x in xs if x & 1]),
        _Step(f"keep what is above {k}", f"xs = [x for x in xs if x > {k}]", lambda xs: [x for x in xs if x > k]),
        _Step(
            f"leave out what is above {k}", f"xs = [x for x in xs if x <= {k}]", lambda xs: [x for x in xs if x <= k]
        ),
        _Step(f"leave out every {k}", f"xs = [x for x in xs if x != {k}]", lambda xs: [x for x in xs if x != k]),
        _Step(f"add {k} to each", f"xs = [x + {k} for x in xs]", lambda xs: [x + k for x in xs]),
        _Step(f"take {k} from each", f"xs = [x - {k} for x in xs]", lambda xs: [x - k for x in xs]),
        _Step(f"multiply each by {k}", f"xs = [x * {k} for x in xs]", lambda xs: [x * k for x in xs]),
        _Step("square each", "xs = [x * x for x in xs]", lambda xs: [x**2 for x in xs]),
        _Step("sort them", "xs = sorted(xs)", sorted),
        _Step("turn the order around", "xs = xs[::-1]", lambda xs: list(reversed(xs))),
        _Step(f"keep the first {few}", f"xs = xs[:{few}]", lambda xs: xs[:few]),
        _Step(f"drop the first {few}", f"xs = xs[{few}:]", lambda xs: xs[few:]),
    )
    return rng.choice(steps)


def _list_end(rng: random.Random) -> _Step:
    k = rng.randint(2, 12)
    ends = (
        _Step("return the list", "return xs", lambda xs: xs),
        _Step("return the sum", "return sum(xs)", sum),
        _Step("return how many there are", "return len(xs)", len),
        _Step("return the largest", "return max(xs)", max),
        _Step("return the smallest", "return min(xs)", min),
        _Step(f"return {k} times the sum", f"return {k} * sum(xs)", lambda xs: sum(xs) * k),
    )
    return rng.choice(ends)


def _lists(rng: random.Random, level: int) -> _Draft:
    steps = [*(_list_step(rng) for _ in range(level)), _list_end(rng)]
    return _Draft("xs", [s.words for s in steps], [s.line for s in steps], _in_turn(steps))


def _text_step(rng: random.Random) -> _Step:
    letter, k = rng.choice("aeinrt"), rng.randint(2, 5)
    other = rng.choice("kopsuz")
    steps = (
        _Step("put it in capitals", "s = s.upper()", str.upper),
        _Step("turn it around", "s = s[::-1]", lambda s: "".join(reversed(s))),
        _Step(f"remove every {letter}", f's = s.replace("{letter}", "")', lambda s: "".join(s.split(letter))),
        _Step(
            f"turn every {letter} into {other}",
            f's = s.replace("{letter}", "{other}")',
            lambda s: other.join(s.split(letter)),
        ),
        _Step(f"keep the first {k} letters", f"s = s[:{k}]", lambda s: s[:k]),
        _Step(f"drop the last {k} letters", f"s = s[:-{k}]", lambda s: s[: max(0, len(s) - k)]),
        _Step(f"repeat it {k} times", f"s = s * {k}", lambda s: "".join(s for _ in range(k))),
        _Step(f"add {letter}{other} at the end", f's = s + "{letter}{other}"', lambda s: f"{s}{letter}{other}"),
    )
    return rng.choice(steps)


def _texts(rng: random.Random, level: int) -> _Draft:
    letter = rng.choice("aeinrt")
    ends = (
        _Step("return it", "return s", lambda s: s),
        _Step("return its length", "return len(s)", len),
        _Step(f"return how often {letter} is in it", f'return s.count("{letter}")', lambda s: list(s).count(letter)),
    )
    steps = [*(_text_step(rng) for _ in range(level)), rng.choice(ends)]
    return _Draft("s", [s.words for s in steps], [s.line for s in steps], _in_turn(steps))


def _change(rng: random.Random) -> _Step:
    k = rng.randint(2, 30)
    changes = (
        _Step(f"x plus {k}", f"x + {k}", lambda x: x + k),
        _Step(f"x minus {k}", f"x - {k}", lambda x: x - k),
        _Step(f"{k} minus x", f"{k} - x", lambda x: k - x),
        _Step(f"{k} times x", f"{k} * x", lambda x: k * x),
        _Step("x squared", "x * x", lambda x: x**2),
        _Step(f"{k}", f"{k}", lambda x: k),
    )
    return rng.choice(changes)


def _question(rng: random.Random) -> _Step:
    k, n = rng.randint(3, 40), rng.randint(2, 7)
    questions = (
        _Step(f"x is above {k}", f"x > {k}", lambda x: x > k),
        _Step(f"x is below {k}", f"x < {k}", lambda x: x < k),
        _Step(f"x can be divided by {n}", f"x % {n} == 0", lambda x: not x % n),
        _Step(f"x is not {k}", f"x != {k}", lambda x: x - k != 0),
    )
    return rng.choice(questions)


def _rules(rng: random.Random, level: int) -> _Draft:
    """``level`` conditions, the first that holds decides."""
    cases = [(_question(rng), _change(rng)) for _ in range(level)]
    last = _change(rng)
    words = [f"if {when.words} return {then.words}" for when, then in cases] + [f"otherwise return {last.words}"]
    lines = [line for when, then in cases for line in (f"if {when.line}:", f"    return {then.line}")]

    def apply(x: int) -> int:
        return next((then for when, then in cases if when.apply(x)), last).apply(x)

    return _Draft("x", words, [*lines, f"return {last.line}"], apply)


def _term(rng: random.Random) -> _Step:
    k, c = rng.randint(2, 20), rng.randint(1, 30)
    terms = (
        _Step(f"{k} times i", f"{k} * i", lambda i: k * i),
        _Step(f"i plus {c}", f"i + {c}", lambda i: i + c),
        _Step("i squared", "i * i", lambda i: i**2),
        _Step(f"i squared minus {c}", f"i * i - {c}", lambda i: i**2 - c),
        _Step(f"{k} times i plus {c}", f"{k} * i + {c}", lambda i: k * i + c),
        _Step(f"{k} times i minus {c}", f"{k} * i - {c}", lambda i: k * i - c),
    )
    return rng.choice(terms)


def _which(rng: random.Random) -> _Step:
    by, k = rng.randint(2, 6), rng.randint(2, 9)
    conditions = (
        _Step(f"i can be divided by {by}", f"i % {by} == 0", lambda i: not i % by),
        _Step(f"i cannot be divided by {by}", f"i % {by} != 0", lambda i: i % by > 0),
        _Step(f"i is not {k}", f"i != {k}", lambda i: i - k != 0),
    )
    return rng.choice(conditions)


def _to_total(rng: random.Random) -> _Step:
    k = rng.randint(2, 20)
    steps = (
        _Step(f"multiply the total by {k}", f"total = total * {k}", lambda total: total * k),
        _Step(f"add {k} to the total", f"total = total + {k}", lambda total: total + k),
        _Step(f"take {k} from the total", f"total = total - {k}", lambda total: total - k),
    )
    return rng.choice(steps)


def _sums(rng: random.Random, level: int) -> _Draft:
    """A sum from a number to n; from level 2 of some terms only, and from level 3 changed at the end."""
    first, term, which = rng.randint(1, 5), _term(rng), _which(rng) if level > 1 else None
    ends = [_to_total(rng) for _ in range(level - 2)]
    words = [f"for i from {first} to n add up {term.words}" + (f" where {which.words}" if which else "")]
    lines = ["total = 0", f"for i in range({first}, n + 1):"]
    lines += [f"    if {which.line}:", f"        total += {term.line}"] if which else [f"    total += {term.line}"]

    def apply(n: int) -> int:
        counted = (i for i in range(first, n + 1) if which is None or which.apply(i))
        total: int = _in_turn(ends)(sum(map(term.apply, counted)))
        return total

    words += [*(step.words for step in ends), "return it"]
    lines += [*(step.line for step in ends), "return total"]
    return _Draft("n", words, lines, apply)


TEMPLATES: dict[str, Callable[[random.Random, int], _Draft]] = {
    "lists": _lists,
    "texts": _texts,
    "rules": _rules,
    "sums": _sums,
}


def _tests(rng: random.Random, name: str, draft: _Draft) -> list[str] | None:
    """Assertions on different inputs; None where the results are all the same, or the largest of nothing."""
    inputs: list[Any] = []
    while len(inputs) < TESTS:
        drawn = INPUTS[draft.argument](rng)
        if drawn not in inputs:
            inputs.append(drawn)
    try:
        found = [draft.apply(value) for value in inputs]
    except ValueError:
        return None
    if all(value == found[0] for value in found):
        return None
    return [f"assert {name}({value!r}) == {result!r}" for value, result in zip(inputs, found, strict=True)]


def _form(draft: _Draft) -> str:
    """The program's results for the probes, as a hash; an error is a result, too."""
    results: list[Any] = []
    for value in PROBES[draft.argument]:
        try:
            results.append(draft.apply(value))
        except ValueError:  # the largest of nothing
            results.append(None)
    return f"{draft.argument} {hash_of(repr(results)):x}"


def _draw(rng: random.Random, level: int) -> Problem | None:
    template, name = rng.choice(tuple(TEMPLATES)), rng.choice(FUNCTIONS)
    draft = TEMPLATES[template](rng, level)
    tests = _tests(rng, name, draft)
    if tests is None:
        return None
    question = f"Write {name}({draft.argument}): {', '.join(draft.words)}."
    lines = [f"def {name}({draft.argument}):", *(f"    {line}" for line in draft.lines)]
    solution = "\n".join(["```python", *lines, "```"])
    return Problem(id_of("pr", question), question, solution, "\n".join(tests), level, template, _form(draft))


def problems(split: str, seed: int = 0, levels: Collection[int] = EASY) -> Iterator[Problem]:
    """Endless stream of programming problems of one split, no two of one form; their ``answer`` is a list of asserts.

    See :func:`~ptl_rl.testbed.problem.distinct`.
    """
    return distinct(_draw, split, seed, levels)
