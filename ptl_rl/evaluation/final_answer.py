r"""What a response gives as its final answer, in the form that its prompt taught it.

An answer counts only if it is stated: a derivation that was cut short is not right because it stopped at the right
number, which is how harnesses that take the last number of any text would have it.
"""

import re

from reward.accuracy import extract_boxed

# Of what few-shot prompts of GSM8K end their examples with.
_THE_ANSWER_IS = re.compile(r"[Tt]he answer is:?[^\S\n]*")
# Of minerva_math's.
_FINAL_ANSWER = re.compile(r"[Tt]he final answer is:?[^\S\n]*")
_END = re.compile(r"\n|\.\s|\.$")
# The pattern below takes quadratic time on a run of commas.
_LONGEST_SENTENCE_CHARS = 1000
# "$18 dollars a day", "**1,234** eggs", "18, which is less than 20": the words do not make a number another one.
_NUMBER_AND_WORDS = re.compile(
    r"(?:US)?[$€£]?\s*([+-]?\d[\d,]*(?:\.\d+)?(?:/\d+)?)(%?)(?![\w/.^*(])[\s,;:]*(?:[A-Za-z].*)?"
)


def final_answer(response: str) -> str | None:
    r"""The last stated answer: ``\boxed{...}``, else what "The (final) answer is ..." says, to the end of the sentence;
    None without either."""
    boxed = extract_boxed(response)
    if boxed is not None:
        return boxed
    for pattern in (_FINAL_ANSWER, _THE_ANSWER_IS):
        _, *stated = pattern.split(response)
        if stated:
            said = _END.split(stated[-1], maxsplit=1)[0].replace("**", "").strip()
            number = _NUMBER_AND_WORDS.fullmatch(said) if len(said) <= _LONGEST_SENTENCE_CHARS else None
            return (number.group(1).rstrip(",") + number.group(2) if number else said) or None
    return None
