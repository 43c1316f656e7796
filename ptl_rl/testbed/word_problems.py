"""Seeded multi-step word problems with a worked solution that ends in ``\\boxed{answer}``.

They stand in for Math-12k in the demo: short enough for a two-million-parameter model, yet several steps long, so
that one wrong intermediate result spoils the answer, which is what pruning does to reasoning.
"""

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache

from ptl_rl.testbed.problem import EASY, Problem, distinct, hash_of, id_of

NAMES = ("Anna Ben Carla Dan Emma Felix Gina Hugo Ida Jonas Kira Leo Mia Nils Olga Paul").split()  # noqa: SIM905
ITEMS = "apples books coins shells cards stamps eggs pears beads pens rings nuts".split()  # noqa: SIM905


MODULUS = 2**61 - 1
"""A prime. Numbers of a story are drawn at random below it, see :class:`_Result`."""


class _Result(int):
    """A number with its image: what it would be if every number of the story were another one, the same for equals.

    Expressions that algebra makes equal have equal images, with 2 as a number like any other: a number added twice
    is not that number times 2. Others do not, but for one chance in 10^17. So the image says which problem it is.
    """

    image: int

    def __new__(cls, value: int, image: int) -> "_Result":
        made = super().__new__(cls, value)
        made.image = image % MODULUS
        return made


@cache
def _drawn_image(number: int) -> int:
    return hash_of(f"number {number}") % MODULUS


def _image(number: int) -> int:
    return number.image if isinstance(number, _Result) else _drawn_image(number)


class _Working:
    """Collects the lines of a worked solution; every method returns the computed integer."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def _note(self, left: int, sign: str, right: int, result: int, image: int) -> _Result:
        self.lines.append(f"{left} {sign} {right} = {result}")
        return _Result(result, image)

    def add(self, left: int, right: int) -> _Result:
        return self._note(left, "+", right, left + right, _image(left) + _image(right))

    def sub(self, left: int, right: int) -> _Result:
        return self._note(left, "-", right, left - right, _image(left) - _image(right))

    def mul(self, left: int, right: int) -> _Result:
        return self._note(left, "*", right, left * right, _image(left) * _image(right))

    def div(self, left: int, right: int) -> _Result:
        return self._note(left, "/", right, left // right, _image(left) * pow(_image(right), -1, MODULUS))


MAX_ANSWER = 199
"""A problem with a result outside 0..MAX_ANSWER is drawn again."""
LONGEST_BASE = 3
"""Templates know levels up to this; what is beyond are further events."""
DISTRACTED = 0.2
"""Share of problems, from level 2 on, that begin with a number that does not matter."""


@dataclass(frozen=True)
class _Draft:
    """A story with its question, the answer, and who then has so many of what, for stories that go on."""

    text: str
    question: str
    value: int
    owner: str
    unit: str


def _event(rng: random.Random, work: _Working, have: int, owner: str, unit: str) -> tuple[str, int]:
    """Something that happens to what ``owner`` has; for several owners ``They``."""
    verb = (lambda one: one) if owner == "They" else (lambda one: one + "s")
    kind = rng.choice(("more", "less", "packs", "friends", "double"))
    if kind == "more":
        count = rng.randint(2, 60)
        more = f"{verb('earn')} {count} dollars" if unit == "dollars" else f"{verb('buy')} {count} more"
        return f"{owner} {more}.", work.add(have, count)
    if kind == "less":
        count = rng.randint(1, max(1, min(60, have - 1)))
        less = f"{verb('spend')} {count} dollars" if unit == "dollars" else f"{verb('lose')} {count} of them"
        return f"{owner} {less}.", work.sub(have, count)
    if kind == "packs":
        packs, each = rng.randint(2, 7), rng.randint(2, 12)
        what = f"{packs} times {each} dollars" if unit == "dollars" else f"{packs} boxes with {each} {unit} each"
        return f"{owner} {verb('get')} {what}.", work.add(have, work.mul(packs, each))
    if kind == "friends":
        friends, each = rng.randint(2, 6), rng.randint(2, 9)
        what = f"{each} dollars" if unit == "dollars" else str(each)
        return f"{owner} {verb('give')} {what} to each of {friends} friends.", work.sub(have, work.mul(each, friends))
    return f"Then {owner.replace('They', 'they')} {verb('double')} the number of {unit}.", work.mul(have, 2)


def _inventory(rng: random.Random, work: _Working, level: int) -> _Draft:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    have = rng.randint(3, 90)
    text = [f"{name} has {have} {item}."]
    for _ in range(level):
        said, have = _event(rng, work, have, name, item)
        text.append(said)
    return _Draft(" ".join(text), f"How many {item} does {name} have now?", have, name, item)


def _shopping(rng: random.Random, work: _Working, level: int) -> _Draft:
    name = rng.choice(NAMES)
    first, second = rng.sample(ITEMS, 2)
    price_a, price_b, count_a, count_b = (rng.randint(2, 12) for _ in range(4))
    cost = work.mul(count_a, price_a)
    text = f"{name} buys {count_a} {first} for {price_a} dollars each"
    if level == 1:
        fee = rng.randint(2, 60)
        text += f" and pays {fee} dollars for delivery."
        return _Draft(text, f"How much does {name} pay?", work.add(cost, fee), name, "dollars")
    text += f" and {count_b} {second} for {price_b} dollars each."
    total = work.add(cost, work.mul(count_b, price_b))
    if level == 2:
        return _Draft(text, f"How much does {name} pay?", total, name, "dollars")
    money = total + rng.randint(1, 90)
    text += f" {name} had {money} dollars."
    return _Draft(text, "How many dollars are left?", work.sub(money, total), name, "dollars")


def _comparison(rng: random.Random, work: _Working, level: int) -> _Draft:
    (one, two, three), item = rng.sample(NAMES, 3), rng.choice(ITEMS)
    base, more, times = rng.randint(3, 60), rng.randint(2, 50), rng.randint(2, 6)
    text = f"{one} has {base} {item}. {two} has {more} more than {one}."
    second = work.add(base, more)
    if level == 1:
        question = f"How many {item} do {one} and {two} have together?"
        return _Draft(text, question, work.add(base, second), "They", item)
    text += f" {three} has {times} times as many as {two}."
    third = work.mul(second, times)
    if level == 2:
        question = f"How many {item} do {two} and {three} have together?"
        return _Draft(text, question, work.add(second, third), "They", item)
    total = work.add(work.add(base, second), third)
    return _Draft(text, f"How many {item} do they have together?", total, "They", item)


def _machine(rng: random.Random, work: _Working, level: int) -> _Draft:
    item, rate = rng.choice(ITEMS), rng.randint(2, 15)
    morning, evening = rng.randint(2, 12), rng.randint(2, 12)
    text = f"A machine packs {rate} {item} per hour. It runs {morning} hours in the morning"
    text += f" and {evening} hours in the evening."
    packed = work.mul(work.add(morning, evening), rate)
    if level == 1:
        return _Draft(text, f"How many {item} does it pack?", packed, "The owner", item)
    broken = rng.randint(1, max(1, min(60, packed - 1)))
    text += f" {broken} of them are broken."
    good = work.sub(packed, broken)
    if level == 2:
        return _Draft(text, f"How many good {item} are there?", good, "The owner", item)
    price = rng.randint(2, 5)
    text += f" The good ones sell for {price} dollars each."
    return _Draft(text, "How many dollars is that?", work.mul(good, price), "The owner", "dollars")


def _sharing(rng: random.Random, work: _Working, level: int) -> _Draft:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    children, share = rng.randint(2, 12), rng.randint(2, 20)
    total = children * share
    found = rng.randint(1, total - 1)
    text = f"{name} has {found} {item} and finds {total - found} more."
    text += f" {name} shares them equally among {children} children."
    each = work.div(work.add(found, total - found), children)
    if level == 1:
        return _Draft(text, f"How many {item} does each child get?", each, "They", item)
    extra = rng.randint(2, 40)
    text += f" Each child already had {extra} {item}."
    now = work.add(each, extra)
    if level == 2:
        return _Draft(text, f"How many {item} does each child have now?", now, "They", item)
    question = f"How many {item} do the {children} children have together?"
    return _Draft(text, question, work.mul(now, children), "They", item)


def _backwards(rng: random.Random, work: _Working, level: int) -> _Draft:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    left, given, sold = rng.randint(2, 70), rng.randint(2, 50), rng.randint(2, 50)
    text = f"{name} sold {sold} {item}, gave away {given} and has {left} left."
    start = work.add(work.add(left, given), sold)
    if level == 1:
        return _Draft(text, f"How many {item} did {name} have at first?", start, name, item)
    found = rng.randint(1, min(50, start - 1))
    text = f"{name} found {found} {item}, then " + text.removeprefix(f"{name} ")
    before = work.sub(start, found)
    if level == 2:
        return _Draft(text, f"How many {item} did {name} have at first?", before, name, item)
    other, times = rng.choice([n for n in NAMES if n != name]), rng.randint(2, 5)
    text += f" {other} had {times} times as many as {name} at first."
    return _Draft(text, f"How many {item} did {other} have?", work.mul(before, times), other, item)


def _savings(rng: random.Random, work: _Working, level: int) -> _Draft:
    name, rate, weeks = rng.choice(NAMES), rng.randint(2, 20), rng.randint(2, 12)
    first = rng.randint(2, 60)
    text = f"{name} has {first} dollars and saves {rate} dollars a week for {weeks} weeks."
    saved = work.add(first, work.mul(rate, weeks))
    if level == 1:
        return _Draft(text, f"How many dollars does {name} have then?", saved, name, "dollars")
    spent = rng.randint(1, max(1, min(90, saved - 1)))
    text += f" Then {name} spends {spent} dollars."
    left = work.sub(saved, spent)
    if level == 2:
        return _Draft(text, f"How many dollars does {name} have then?", left, name, "dollars")
    other, more = rng.choice([n for n in NAMES if n != name]), rng.randint(2, 60)
    text += f" {other} has {more} dollars more than {name} then."
    return _Draft(text, f"How many dollars does {other} have?", work.add(left, more), other, "dollars")


def _reading(rng: random.Random, work: _Working, level: int) -> _Draft:
    name, rate, days = rng.choice(NAMES), rng.randint(2, 20), rng.randint(2, 12)
    pages = min(MAX_ANSWER, rate * days + rng.randint(1, 90))
    text = [f"A book has {pages} pages. {name} reads {rate} pages a day for {days} days."]
    left = work.sub(pages, work.mul(rate, days))
    for _ in range(level - 1):
        if rng.random() < 0.5:
            more = rng.randint(1, max(1, min(30, left - 1)))
            text.append(f"Then {name} reads {more} pages.")
            left = work.sub(left, more)
        else:
            rate, days = rng.randint(2, 9), rng.randint(2, 6)
            text.append(f"Then {name} reads {rate} pages a day for {days} days.")
            left = work.sub(left, work.mul(rate, days))
    return _Draft(" ".join(text), "How many pages are left?", left, name, "pages")


TEMPLATES: dict[str, Callable[[random.Random, _Working, int], _Draft]] = {
    "inventory": _inventory,
    "shopping": _shopping,
    "comparison": _comparison,
    "machine": _machine,
    "sharing": _sharing,
    "backwards": _backwards,
    "savings": _savings,
    "reading": _reading,
}


ENDLESS = ("inventory", "reading")
"""Templates that know every level."""


def _gone_on(rng: random.Random, work: _Working, draft: _Draft, events: int) -> _Draft:
    """The story told further, in place of its question."""
    text, have, owner, unit = [draft.text], draft.value, draft.owner, draft.unit
    for _ in range(events):
        said, have = _event(rng, work, have, owner, unit)
        text.append(said)
    who = f"do {owner.lower()}" if owner == "They" else f"does {owner.replace('The', 'the')}"
    return _Draft(" ".join(text), f"How many {unit} {who} have now?", have, owner, unit)


def _distractor(rng: random.Random, text: str) -> str:
    """A sentence on somebody and something that the story does not know."""
    name = rng.choice([name for name in NAMES if name not in text])
    item = rng.choice([item for item in ITEMS if item not in text])
    return f"{name} has {rng.randint(2, 90)} {item}. "


def _draw(rng: random.Random, level: int) -> Problem | None:
    template, work = rng.choice(tuple(TEMPLATES)), _Working()
    known = level if template in ENDLESS else min(level, LONGEST_BASE)
    draft = TEMPLATES[template](rng, work, known)
    if level > known:
        draft = _gone_on(rng, work, draft, level - known)
    numbers = [int(line.rsplit(" ", 1)[1]) for line in work.lines]
    if min(numbers) < 0 or max(numbers) > MAX_ANSWER:
        return None
    text = draft.text
    if level > 1 and rng.random() < DISTRACTED:
        text = _distractor(rng, text) + text
    question = f"{text} {draft.question}"
    solution = "\n".join([*work.lines, f"\\boxed{{{draft.value}}}"])
    form = f"{_image(draft.value):x}"
    return Problem(id_of("wp", question), question, solution, str(draft.value), level, template, form)


def problems(split: str, seed: int = 0, levels: Collection[int] = EASY) -> Iterator[Problem]:
    """Endless stream of word problems of one split, no two of one form; :func:`~ptl_rl.testbed.problem.distinct`."""
    return distinct(_draw, split, seed, levels)
