r"""Accuracy reward: is the boxed answer mathematically equal to the ground truth?

Only the last closed `\boxed{...}` counts; a response without one earns 0. That is stricter than
math-verify's own extraction, which takes the last number of any text for an answer: a policy soon learns to
end on a list of guesses, and a truncated derivation would be paid for whatever number it stopped at.

Most answers are decided here by comparing normalised text. The others go to math-verify, in a child process
with limits (`reward.judge_pool`): its own time limit uses `signal.alarm`, which works in a main thread only,
and verl calls a reward function from the threads of a pool.

What math-verify accepts is accepted: `x=5` for `5`, `0.5` and `50` for `50\%`, `5 \text{ cm}` for `5`, and
lists without brackets in any order.
"""

import functools
import re

from reward.boxed import find_boxes
from reward.judge_pool import default_pool

# An answer longer than this (beyond the ground truth's own length) is not worth a parse: it is degenerate
# text.
_LONGEST_ANSWER_CHARS = 1000

_SPACING = re.compile(r"\\[!,;: ]|~")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")
_SIZED_DELIMITER = re.compile(r"\\(?:left|right)(?![A-Za-z])")
_SIZED_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}\\]*)\}")
_INTEGER = re.compile(r"([+-]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)")


def extract_boxed(text: str) -> str | None:
    r"""Return what the last closed `\boxed{...}` of `text` holds, stripped; None if there is none.

    Of two nested boxes the inner one counts; a box that is never closed is passed over.
    """
    for box in reversed(find_boxes(text)):
        if box.content is not None:
            return box.content.strip()
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
    plain_answer, plain_gold = _normalise(answer), _normalise(gold)
    if plain_answer == plain_gold:
        return True
    integer_answer, integer_gold = _integer(plain_answer), _integer(plain_gold)
    if integer_answer is not None and integer_gold is not None:
        return integer_answer == integer_gold
    return bool(plain_answer) and _is_equal(_without_dollars(gold), _without_dollars(answer))


# The rollouts of one prompt repeat their answers, and a hostile one costs its full time limit each time.
@functools.lru_cache(maxsize=4096)
def _is_equal(gold: str, answer: str) -> bool:
    return default_pool().judge(gold, answer) == "equal"


def _normalise(latex: str) -> str:
    """Drop what changes the look of an answer and never its value."""
    plain = _without_dollars(latex)
    plain = _SPACING.sub("", plain).replace("{,}", ",")
    plain = _SIZED_FRACTION.sub(r"\\frac", _SIZED_DELIMITER.sub("", plain))
    # Split first: the pattern sees single spaces only, so that long runs of them cost linear time. A space
    # between two letters or digits stays: "1 2" is not 12.
    plain = _LOOSE_SPACE.sub("", " ".join(plain.split()))
    text = _TEXT.fullmatch(plain)
    return text.group(1).strip() if text else plain


def _without_dollars(latex: str) -> str:
    """Strip math delimiters and the full stop of a sentence, which math-verify does not parse."""
    return re.sub(r"(?<!\\)\$", "", latex).strip().rstrip(".").rstrip()


def _integer(plain: str) -> str | None:
    """Return the canonical digits, or None. Text and not `int`, which refuses more than 4300 digits."""
    match = _INTEGER.fullmatch(plain)
    if match is None:
        return None
    digits = match.group(2).replace(",", "").lstrip("0")
    return ("-" if match.group(1) == "-" else "") + digits if digits else "0"
