r"""Accuracy reward: is the boxed answer mathematically equal to the ground truth?

Only the last closed `\boxed{...}` counts; a response without one earns 0. That is stricter than
math-verify's own extraction, which takes the last number of any text for an answer: a policy soon learns to
end on a list of guesses, and a truncated derivation would be paid for whatever number it stopped at.

Most answers are decided here by comparing normalised text (`reward.answer_text`). The others go to math-verify, in
a child process with limits (`reward.judge_pool`): its own time limit uses `signal.alarm`, which works in a main
thread only, and verl calls a reward function from the threads of a pool.

Accepted are `x=5` for `5`, `0.5` and `50` for `50\%`, `5 \text{ cm}` and `5 dollars` for `5`, `0.333333` (six places)
for `1/3`, `m+n=25` for `25`, and lists without brackets in any order (`12, 144` is one; `12,144` may be a number,
too). A wrong answer that is paid teaches more harm than a right one
that is not, so what can be read in two ways is refused: a chain such as `4 = 5`, another unit than the known
answer's, words in another order, and a sum, limit or integral that nobody has worked out.
"""

import functools
import re
from itertools import product

from reward.answer_text import GREEK, NUMBER_WORDS, compact, in_latex, in_one_form, is_balanced, measure, normalise
from reward.boxed import find_boxes
from reward.judge_pool import default_pool

# An answer longer than this (beyond the ground truth's own length) is not worth a parse: it is degenerate
# text. What is longer than the second limit, with its ground truth, is compared as text alone.
_LONGEST_ANSWER_CHARS = 1000
_LONGEST_PARSED_CHARS = 5000

_INTEGER = re.compile(r"([+-]?) ?([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)")
_BASED = re.compile(r"([0-9][0-9A-Fa-f]*|[A-F][0-9A-F]+)(?:_\{?([0-9]+)\}?)?")
_DIGITS_OF_A_BASE = re.compile(r"(?:^|[^A-Za-z0-9])[0-9A-F]*[0-9]_")
_WRITTEN_OUT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\{([^{}\\]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'’ -]*")
# An answer with one of these that the known answer lacks is the question again, a hedge, or a second answer.
_NOT_WORKED_OUT = re.compile(
    r"\\(?:sum|prod|i{0,2}int|oint|lim|gcd|lcm|max|min|to|(?:long)?[rR]ightarrow|Longrightarrow|implies"
    r"|mapsto|[lcd]?dots|fbox|operatorname\{(?:lcm|gcd|max|min))(?![A-Za-z])|\.\.\."
)
_EQUALS = re.compile(r"(?<![<>!\\:=])=(?!=)")
_ALMOST = re.compile(r"\\approx(?![A-Za-z])")
_GREEK = rf"\\(?i:var)?(?i:{'|'.join(GREEK)})(?![A-Za-z])"
_VARIABLE = re.compile(rf"(?:[A-Za-z]|{_GREEK})(?:_(?:[A-Za-z0-9]|\{{[^{{}}]*\}}))?")
_NO_VARIABLES = re.compile(
    rf"\\(?:text|textbf|textit|textrm|mathrm|mbox)\{{[^{{}}]*\}}|\\(?:begin|end)\{{[a-z*]*\}}|(?!{_GREEK})\\[A-Za-z]+"
)
_PLAIN_NAME = re.compile(r"[A-Za-z\\(\[|][^+*/^<>-]*")
_LONE_NAME = re.compile(r"[A-Za-z]|\\(?:text|mathrm|mbox)\{[^{}0-9]*\}")
_APPLIED = re.compile(r"[A-Za-z]'*(?:\^\{-1\})?\(")
_RELATION = re.compile(r"[<>]|\\(?:[lg]eq?|neq?|in|approx|sim|equiv)(?![A-Za-z])")
_LISTED = re.compile(r"[,;](?![0-9]{3}(?![0-9]))")
_ARGUMENTS = re.compile(r"(?<=[A-Za-z])\([^()]*\)")
_MOST_PARTS = 4


def extract_boxed(text: str) -> str | None:
    r"""Return what the last closed `\boxed{...}` of `text` holds, stripped; None if there is none.

    Of two nested boxes the inner one counts; a box that is never closed is passed over.
    """
    for box in reversed(find_boxes(text)):
        content = box.content(text)
        if content is not None:
            return content.strip()
    return None


def accuracy_reward(response: str, ground_truth: str | int | float) -> float:
    r"""Return 1.0 if the answer in the response's last box equals `ground_truth` (LaTeX), else 0.0.

    Safe in any thread, and bounded: an answer that math-verify cannot decide within its limits of time and
    memory earns 0. Raises ValueError if the ground truth is empty, and RuntimeError if math-verify cannot be
    started at all.
    """
    gold = str(ground_truth).strip()
    if not gold:
        raise ValueError("the ground truth is empty: every sample needs reward_model.ground_truth")
    answer = extract_boxed(response)
    return float(answer is not None and answers_equal(answer, gold))


def answers_equal(answer: str, gold: str) -> bool:
    """True if the two answers (LaTeX, without their boxes) are mathematically equal; bounds as of `accuracy_reward`."""
    if not answer or len(answer) > _LONGEST_ANSWER_CHARS + len(gold):
        return False
    texts = [normalise(in_latex(text)) for text in (answer, gold)]
    if compact(texts[0]) == compact(texts[1]):
        return bool(texts[0])
    (value, unit), (gold_value, gold_unit) = map(measure, texts)
    if not value or (unit and gold_unit and unit != gold_unit) or not is_balanced(value + gold_value):
        return False
    e_is_ten = "10^" in value + gold_value
    value, gold_value = (in_one_form(text, e_is_ten) for text in (value, gold_value))
    verdict = _by_text(value, gold_value)
    if verdict is not None or max(len(value), len(gold_value)) > _LONGEST_PARSED_CHARS:
        return bool(verdict)
    return _chains_agree(value, gold_value)


def _by_text(answer: str, gold: str) -> bool | None:
    """Decide what needs no mathematics, or in which math-verify would see too little; None: ask it."""
    lists, gold_lists = _separators(answer), _separators(gold)
    integers, gold_integers = _integers(answer), _integers(gold)
    integer, gold_integer = _integer(answer), _integer(gold)
    answer, gold = compact(answer), compact(gold)
    if answer == gold:
        return True
    if integers is not None and gold_integers is not None:
        return integers == gold_integers or (integer is not None and integer == gold_integer)
    if _DIGITS_OF_A_BASE.search(answer) or _DIGITS_OF_A_BASE.search(gold):
        based, gold_based = _BASED.fullmatch(answer), _BASED.fullmatch(gold)
        if based is None or gold_based is None or based.group(1).lower() != gold_based.group(1).lower():
            return False
        return None in (based.group(2), gold_based.group(2)) or based.group(2) == gold_based.group(2)
    if _WRITTEN_OUT.sub(_inside, answer) == _WRITTEN_OUT.sub(_inside, gold):
        return True
    words, gold_words = _words(answer), _words(gold)
    written_out = max(len(words), len(gold_words)) > 2 or "text" in answer + gold or "no" in (words, gold_words)
    if words and gold_words and written_out:
        return words == gold_words  # as a product of letters "listen" would be "silent"
    if len(answer) == len(gold) == 1:
        return False
    if set(_NOT_WORKED_OUT.findall(answer)) != set(_NOT_WORKED_OUT.findall(gold)):
        return False
    if _is_bracketed(answer) and _is_bracketed(gold) and answer.startswith(r"\{") != gold.startswith(r"\{"):
        return False
    if r"\pm" in answer + gold or any(text.startswith(("(", "[", r"\{")) for text in (answer, gold)):
        return None
    return None if max(lists[0], gold_lists[0]) <= min(lists[1], gold_lists[1]) else False


def _separators(text: str) -> tuple[int, int]:
    """How many commas list, at least and at most: one before three digits, without a space, may group digits."""
    text = _ARGUMENTS.sub("", text)
    return len(_LISTED.findall(text)), len(re.findall("[,;]", text))


def _is_bracketed(text: str) -> bool:
    """True if the bracket that opens the text closes at its end."""
    depth = 0
    for bracket in re.finditer(r"[()\[\]]|\\[{}]", text):
        depth += 1 if bracket.group() in ("(", "[", r"\{") else -1
        if depth <= 0 or bracket.end() == len(text):
            return depth == 0 and bracket.end() == len(text) and text.startswith(("(", "[", r"\{"))
    return False


def _inside(text: re.Match[str]) -> str:
    return text.group(1)


def _words(text: str) -> str:
    """The letters of an answer in words, small; "" for any other."""
    words = _WORDS.fullmatch(_WRITTEN_OUT.sub(_inside, text).strip())
    return re.sub("[^a-z]", "", words.group().lower()) if words else ""


def _chains_agree(answer: str, gold: str) -> bool:
    """Ask math-verify, for every part of `a = b = c`: it would look at the last one alone."""
    answer, gold = (_head_of_rounded(text) for text in (answer, gold))
    parts, gold_parts = ([text] if _separators(text)[0] else _EQUALS.split(text) for text in (answer, gold))
    if len(parts) <= 2 and len(parts) == len(gold_parts):
        return _is_equal(gold, answer)  # `x+y=3` and `y=3-x` are its to compare
    if max(len(parts), len(gold_parts)) > _MOST_PARTS:
        return False
    (name, parts), (gold_name, gold_parts) = _without_names(parts), _without_names(gold_parts)
    if name and gold_name and name != gold_name:
        return False
    return all(_is_equal(known, part) for known, part in product(gold_parts, parts))


def _without_names(chain: list[str]) -> tuple[str, list[str]]:
    """The name in front of a chain, "" for none, and the parts that must be equal: a name stands for what follows."""
    head, *rest = chain
    if not rest:
        return "", chain
    known = _variables(rest[-1])
    values = [part for part in rest[:-1] if not _may_name(part) or not _variables(part) - known]
    if _may_name(head) and _is_name(head.strip(), known):
        return compact(head), [*values, rest[-1]]
    return "", [head, *values, rest[-1]]


def _variables(text: str) -> set[str]:
    return set(_VARIABLE.findall(_NO_VARIABLES.sub(" ", text))) - {"e", "i"}


def _may_name(part: str) -> bool:
    """True unless it is a measure, a relation, or a number in words."""
    words = {word.lower() for word in re.findall("[A-Za-z]+", part)}
    is_measure = measure(part.strip(" ()")).unit or words & (NUMBER_WORDS | {"no", "not"})
    return not is_measure and not _RELATION.search(re.sub(r"\([^()]*\)", "", part))


def _is_name(head: str, known: set[str]) -> bool:
    r"""True for `x`, `f(2)` and `m+n`; `2x` and `x^2` name nothing, but are not solved."""
    variables = _variables(head)
    if not variables or _LONE_NAME.fullmatch(head):
        return bool(_LONE_NAME.fullmatch(head))
    (variable, *others) = variables
    if not others and re.fullmatch("[a-z]", variable) and not _APPLIED.search(head):
        return not re.search(r"[0-9+*/^-]", head)
    return bool(variables - known or _PLAIN_NAME.fullmatch(head))


def _head_of_rounded(text: str) -> str:
    r"""Of `5/3 \approx 1.67` the value before the rounded one; of `x \approx 1.67` that."""
    head, *rounded = _ALMOST.split(text, maxsplit=1)
    return rounded[0] if rounded and re.fullmatch(r"\s*[A-Za-z]?\s*", head) else head


# The rollouts of one prompt repeat their answers, and a hostile one costs its full time limit each time.
@functools.lru_cache(maxsize=4096)
def _is_equal(gold: str, answer: str) -> bool:
    return default_pool().judge(gold.strip(), answer.strip()) == "equal"


def _integers(plain: str) -> list[str] | None:
    """The integers of a list in order, None for anything else; where a comma has a space behind it, only such list."""
    parts = re.split("[,;] " if re.search("[,;] ", plain) else "[,;]", plain)
    integers = [integer for part in parts if (integer := _integer(part.strip())) is not None]
    return sorted(integers) if len(integers) == len(parts) else None


def _integer(plain: str) -> str | None:
    """Return the canonical digits, or None. Text and not `int`, which refuses more than 4300 digits."""
    match = _INTEGER.fullmatch(plain)
    if match is None:
        return None
    digits = match.group(2).replace(",", "").lstrip("0")
    return ("-" if match.group(1) == "-" else "") + digits if digits else "0"
