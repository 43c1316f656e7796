"""Seeded multi-step word problems with a worked solution that ends in ``\\boxed{answer}``.

They stand in for Math-12k in the demo: short enough for a two-million-parameter model, yet several steps long, so
that one wrong intermediate result spoils the answer, which is what pruning does to reasoning.
"""

import random
from collections.abc import Callable, Iterator

from ptl_rl.testbed.problem import LEVELS, Problem, distinct, id_of

NAMES = ("Anna Ben Carla Dan Emma Felix Gina Hugo Ida Jonas Kira Leo Mia Nils Olga Paul").split()  # noqa: SIM905
ITEMS = "apples books coins shells cards stamps eggs pears beads pens rings nuts".split()  # noqa: SIM905


class _Working:
    """Collects the lines of a worked solution; every method returns the computed integer."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def _note(self, left: int, sign: str, right: int, result: int) -> int:
        self.lines.append(f"{left} {sign} {right} = {result}")
        return result

    def add(self, left: int, right: int) -> int:
        return self._note(left, "+", right, left + right)

    def sub(self, left: int, right: int) -> int:
        return self._note(left, "-", right, left - right)

    def mul(self, left: int, right: int) -> int:
        return self._note(left, "*", right, left * right)

    def div(self, left: int, right: int) -> int:
        return self._note(left, "/", right, left // right)


Draft = tuple[str, int]
"""A template's result: the question and its integer answer. An answer outside 0..MAX_ANSWER is drawn again."""
MAX_ANSWER = 199


def _inventory(rng: random.Random, work: _Working, level: int) -> Draft:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    have = rng.randint(5, 60)
    text = [f"{name} has {have} {item}."]
    for _ in range(level):
        event = rng.choice(("buy", "lose", "boxes", "friends", "double"))
        if event == "buy":
            count = rng.randint(2, 40)
            text.append(f"{name} buys {count} more.")
            have = work.add(have, count)
        elif event == "lose":
            count = rng.randint(1, max(1, min(40, have - 1)))
            text.append(f"{name} loses {count} of them.")
            have = work.sub(have, count)
        elif event == "boxes":
            boxes, each = rng.randint(2, 6), rng.randint(2, 9)
            text.append(f"{name} gets {boxes} boxes with {each} {item} each.")
            have = work.add(have, work.mul(boxes, each))
        elif event == "friends":
            friends, each = rng.randint(2, 5), rng.randint(2, 6)
            text.append(f"{name} gives {each} to each of {friends} friends.")
            have = work.sub(have, work.mul(each, friends))
        else:
            text.append(f"Then {name} doubles the number of {item}.")
            have = work.mul(have, 2)
    return " ".join(text) + f" How many {item} does {name} have now?", have


def _shopping(rng: random.Random, work: _Working, level: int) -> Draft:
    name = rng.choice(NAMES)
    first, second = rng.sample(ITEMS, 2)
    price_a, price_b, count_a, count_b = (rng.randint(2, 9) for _ in range(4))
    cost = work.mul(count_a, price_a)
    text = f"{name} buys {count_a} {first} for {price_a} dollars each"
    if level == 1:
        fee = rng.randint(2, 20)
        return f"{text} and pays {fee} dollars for delivery. How much does {name} pay?", work.add(cost, fee)
    text += f" and {count_b} {second} for {price_b} dollars each."
    total = work.add(cost, work.mul(count_b, price_b))
    if level == 2:
        return f"{text} How much does {name} pay?", total
    money = total + rng.randint(1, 50)
    return f"{text} {name} had {money} dollars. How many dollars are left?", work.sub(money, total)


def _comparison(rng: random.Random, work: _Working, level: int) -> Draft:
    (one, two, three), item = rng.sample(NAMES, 3), rng.choice(ITEMS)
    base, more, times = rng.randint(3, 30), rng.randint(2, 20), rng.randint(2, 4)
    text = f"{one} has {base} {item}. {two} has {more} more than {one}."
    second = work.add(base, more)
    if level == 1:
        return f"{text} How many {item} do {one} and {two} have together?", work.add(base, second)
    text += f" {three} has {times} times as many as {two}."
    third = work.mul(second, times)
    if level == 2:
        return f"{text} How many {item} do {two} and {three} have together?", work.add(second, third)
    total = work.add(work.add(base, second), third)
    return f"{text} How many {item} do they have together?", total


def _machine(rng: random.Random, work: _Working, level: int) -> Draft:
    item, rate = rng.choice(ITEMS), rng.randint(3, 9)
    morning, evening = rng.randint(2, 6), rng.randint(2, 6)
    text = f"A machine packs {rate} {item} per hour. It runs {morning} hours in the morning"
    text += f" and {evening} hours in the evening."
    packed = work.mul(work.add(morning, evening), rate)
    if level == 1:
        return f"{text} How many {item} does it pack?", packed
    broken = rng.randint(1, min(20, packed - 1))
    text += f" {broken} of them are broken."
    good = work.sub(packed, broken)
    if level == 2:
        return f"{text} How many good {item} are there?", good
    price = rng.randint(2, 3)
    return f"{text} The good ones sell for {price} dollars each. How many dollars is that?", work.mul(good, price)


def _sharing(rng: random.Random, work: _Working, level: int) -> Draft:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    children, share = rng.randint(2, 9), rng.randint(2, 12)
    total = children * share
    found = rng.randint(1, total - 1)
    text = f"{name} has {found} {item} and finds {total - found} more."
    text += f" {name} shares them equally among {children} children."
    each = work.div(work.add(found, total - found), children)
    if level == 1:
        return f"{text} How many {item} does each child get?", each
    extra = rng.randint(2, 20)
    text += f" Each child already had {extra} {item}."
    now = work.add(each, extra)
    if level == 2:
        return f"{text} How many {item} does each child have now?", now
    return f"{text} How many {item} do the {children} children have together?", work.mul(now, children)


def _backwards(rng: random.Random, work: _Working, level: int) -> Draft:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    left, given, sold = rng.randint(2, 50), rng.randint(2, 30), rng.randint(2, 30)
    text = f"{name} sold {sold} {item}, gave away {given} and has {left} left."
    start = work.add(work.add(left, given), sold)
    if level == 1:
        return f"{text} How many {item} did {name} have at first?", start
    found = rng.randint(1, min(20, start - 1))
    text = f"{name} found {found} {item}, then " + text.removeprefix(f"{name} ")
    before = work.sub(start, found)
    if level == 2:
        return f"{text} How many {item} did {name} have at first?", before
    other, times = rng.choice([n for n in NAMES if n != name]), rng.randint(2, 3)
    text += f" {other} had {times} times as many as {name} at first."
    return f"{text} How many {item} did {other} have?", work.mul(before, times)


TEMPLATES: dict[str, Callable[[random.Random, _Working, int], Draft]] = {
    "inventory": _inventory,
    "shopping": _shopping,
    "comparison": _comparison,
    "machine": _machine,
    "sharing": _sharing,
    "backwards": _backwards,
}


def _draw(rng: random.Random) -> Problem | None:
    template, level = rng.choice(tuple(TEMPLATES)), rng.choice(LEVELS)
    work = _Working()
    question, answer = TEMPLATES[template](rng, work, level)
    numbers = [int(line.rsplit(" ", 1)[1]) for line in work.lines]
    if min(numbers) < 0 or max(numbers) > MAX_ANSWER:
        return None
    solution = "\n".join([*work.lines, f"\\boxed{{{answer}}}"])
    return Problem(id_of("wp", question), question, solution, str(answer), level, template)


def problems(split: str, seed: int = 0) -> Iterator[Problem]:
    """Endless stream of distinct word problems of one split; see :func:`~ptl_rl.testbed.problem.distinct`."""
    return distinct(_draw, split, seed)
