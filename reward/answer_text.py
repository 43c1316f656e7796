r"""How people write an answer, brought to one form as text, before anything is parsed.

Everything here is linear in the length of the answer and changes the look of a value, never the value. What is
not understood stays as it is.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

_SIGNS = {
    **dict.fromkeys("−–﹣", "-"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),  # of no width
    **{"×": r"\times ", "÷": "/", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "⁄": "/", "∕": "/", "％": "%", "＄": r"\$"},
    **{"π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "±": r"\pm ", "°": r"^\circ ", "º": r"^\circ "},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
    **{"∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "（": "(", "）": ")", "，": ",", "．": ".", "［": "[", "］": "]"},
    **{chr(sign): f"\\frac{{{top}}}{{{bottom}}}" for sign, (top, bottom) in zip(
        (0xBD, 0xBC, 0xBE, 0x2153, 0x2154, 0x215B, 0x215C, 0x215D, 0x215E),
        ((1, 2), (1, 4), (3, 4), (1, 3), (2, 3), (1, 8), (3, 8), (5, 8), (7, 8)),
        strict=True,
    )},
}  # fmt: skip
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_ROOT = re.compile(r"√ ?(?:([0-9.]+|[A-Za-z]|\\pi )|\(([^()]*)\)|(?=\{))")

_MATH_SIGN = re.compile(r"(?<!\\)(?:\\[()\[\]]|\$)")
_NO_SPACE = re.compile(r"(?<!\\)\\!|(?<=[0-9])\\,(?=[0-9]{3})")
_SPACING = re.compile(r"(?<!\\)\\[!,;: ]|~|\\(?:quad|displaystyle)(?![A-Za-z])|\\(?:text|mbox|mathrm)\{ *\}")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")
_SIZED_DELIMITER = re.compile(r"\\(?:left|right|[bB]ig{1,2}[lr]?)(?![A-Za-z])")
_SIZED_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_FONT = re.compile(r"\\(?:boldsymbol|mathbf|bm|mathrm|underline|(?:text)?color\{[a-z]{1,20}\}) ?(?=\{)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\{([^{}\\]*)\}")
_AND = re.compile(r",? ?(?:\\(?:text|mbox)\{ ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])) ?")
_SCIENTIFIC = re.compile(r"([+-]?(?:[0-9]+\.[0-9]+(?=[eE])|[0-9]+(?=E[+-]?[0-9]|e[+-]?[0-9]{2})))[eE]\+?(-?[0-9]+)")
_MIXED = re.compile(r"([+-]?[0-9]+) ([0-9]+)/([0-9]+)")
_REPEATING = re.compile(r"([+-]?)([0-9]{0,50})\.([0-9]{0,50})\\overline\{([0-9]{1,50})\}")
_PERCENT = re.compile(r"(?<=[0-9}]) ?(?:percent|\\text\{ ?percent\})$")
_CHOICE = re.compile(r"\(([A-Z])\)")


def in_latex(answer: str) -> str:
    """Return `answer` in LaTeX: signs and digits of other scripts, roots, powers and fractions in one character."""
    if answer.isascii():
        return answer
    answer = _RAISED.sub(lambda run: f"^{{{run.group().translate(_SUPERSCRIPT)}}}", answer)
    answer = "".join(str(int(sign)) if sign.isdecimal() else _SIGNS.get(sign, sign) for sign in answer)
    return _ROOT.sub(lambda root: rf"\sqrt{{{root.group(1) or root.group(2)}}}" if root.lastindex else r"\sqrt", answer)


def normalise(answer: str) -> str:
    """Drop what changes the look of an answer and never its value; `answer` is in LaTeX."""
    plain = _SPACING.sub(" ", _NO_SPACE.sub("", _MATH_SIGN.sub("", answer.replace(r"\$", "\0")))).replace("\0", r"\$")
    plain = _SIZED_FRACTION.sub(r"\\frac", _SIZED_DELIMITER.sub("", plain.replace("{,}", ",")))
    # From here on there are single spaces only, so that long runs of them cost linear time.
    plain = _AND.sub(", ", " ".join(plain.split())).replace(r"\varnothing", r"\emptyset").replace(r"\degree", r"^\circ")
    plain = plain.removeprefix("**").removesuffix("**")
    plain = _unwrapped(plain.rstrip(" .,;").removesuffix("**").strip())
    scientific, mixed, repeating = (form.fullmatch(plain) for form in (_SCIENTIFIC, _MIXED, _REPEATING))
    if scientific:
        return rf"{scientific.group(1)}\times 10^{{{scientific.group(2)}}}"
    if mixed:
        return rf"{mixed.group(1)}\frac{{{mixed.group(2)}}}{{{mixed.group(3)}}}"
    if repeating:
        sign, whole, fixed, again = repeating.groups()
        value = Fraction(
            int(whole + fixed + again) - int(whole + fixed or 0), 10 ** len(fixed) * (10 ** len(again) - 1)
        )
        return rf"{sign}\frac{{{value.numerator}}}{{{value.denominator}}}"
    choice = _CHOICE.fullmatch(plain)
    return choice.group(1) if choice else plain


def compact(plain: str) -> str:
    """Drop the spaces that mean nothing; one between two letters or digits stays: "1 2" is not 12."""
    return _LOOSE_SPACE.sub("", plain)


def _unwrapped(plain: str) -> str:
    r"""Without braces, fonts and colours around the whole; `\text` of a number is one, too."""
    for _ in range(4):
        font = _FONT.match(plain)
        inner = plain[font.end() if font else 0 :]
        if not (inner.startswith("{") and inner.endswith("}") and _closes_last(inner)):
            break
        if font and font.group().startswith(r"\mathrm") and not inner[1:2].isdigit():
            break
        plain = inner[1:-1].strip()
    text = _TEXT.fullmatch(plain)
    if text and re.fullmatch(r"\s*(?:[0-9][^A-Za-z]*|\([A-Z]\)|[A-Z])\s*", text.group(1)):
        return text.group(1).strip()
    return plain


def _closes_last(braced: str) -> bool:
    return next((end for end, depth in _depths(braced) if depth == 0), None) == len(braced)


def is_balanced(latex: str) -> bool:
    """True if every brace is closed, and none that is not open."""
    last = 0
    for _, last in _depths(latex):
        if last < 0:
            return False
    return last == 0


def _depths(latex: str) -> Iterator[tuple[int, int]]:
    """For every brace the offset behind it, and how many are then open."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", latex, re.S):
        if not token.group().startswith("\\"):
            depth += 1 if token.group() == "{" else -1
            yield token.end(), depth


# Words and their abbreviations; a plural's s is dropped first. Words that are not listed are units as they stand.
_UNIT_NAMES = {
    **{"cm": "centimeter", "mm": "millimeter", "km": "kilometer", "m": "meter", "centimetre": "centimeter"},
    **{"kilometre": "kilometer", "millimetre": "millimeter", "metre": "meter", "in": "inch", "inche": "inch"},
    **{"ft": "foot", "feet": "foot", "yd": "yard", "mi": "mile", "kg": "kilogram", "g": "gram", "mg": "milligram"},
    **{"lb": "pound", "oz": "ounce", "hr": "hour", "h": "hour", "min": "minute", "sec": "second", "s": "second"},
    **{"ml": "milliliter", "l": "liter", "litre": "liter", "deg": "degree", "usd": "dollar", "sq": "square"},
    **{"celsius": "c", "fahrenheit": "f", "mph": "mile per hour", "kph": "kilometer per hour"},
}  # fmt: skip
_GLUED = {
    "cm", "mm", "km", "kg", "ft", "lb", "lbs", "hr", "hrs",
    "mph", "kph", "min", "sec", "ml", "degrees", "pm", "am",
}  # fmt: skip
_SHORT = _GLUED | {"m", "in", "yd", "oz", "mi", "usd", "day", "days", "mg"}
# Words that belong to the value.
_NO_UNITS = {
    "pi", "theta", "sqrt", "frac", "sin", "cos", "tan", "log", "ln",
    "exp", "mod", "choose", "inf", "infinity", "not", "no",
}  # fmt: skip
_VALUE = r"(?P<value>.*[0-9)}\]]) ?"
_UNIT_IN_TEXT = re.compile(
    r"(?P<value>.*\S) ?\\(?:text|textrm|mathrm|mbox|textbf|operatorname)\{(?P<unit>[A-Za-z. /-]*)\}"
    r"(?P<power> ?\^ ?\{?[23]\}?)?",
    re.S,
)
_UNIT_IN_WORDS = re.compile(_VALUE + r"(?P<unit>[A-Za-z][A-Za-z. ]*)(?P<power>\^ ?\{?[23]\}?)?", re.S)
_DEGREES = re.compile(_VALUE + r"\^ ?\{?\\circ ?\}?(?: ?(?:\\(?:text|mathrm)\{ ?)?(?P<scale>[CF])\}?)?", re.S)
_CURRENCY = re.compile(r"([+-]?)(?:US ?)?(\\\$|£|€) ?(?=[0-9.+-])")
_CURRENCIES = {r"\$": "dollar", "£": "pound", "€": "euro"}


class Measure(NamedTuple):
    """A value and the unit that stands with it, "" for none."""

    value: str
    unit: str


def measure(plain: str) -> Measure:
    """Split a normalised answer into its value and its unit."""
    percent = _PERCENT.search(plain)
    if percent:
        return Measure(plain[: percent.start()] + r"\%", "")
    money = _CURRENCY.match(plain)
    if money:
        return Measure(money.group(1) + measure(plain[money.end() :]).value, _CURRENCIES[money.group(2)])
    degrees = _DEGREES.fullmatch(plain)
    if degrees and re.search(r"[A-Za-z]", degrees["value"]) is None:
        return Measure(degrees["value"], f"degree {(degrees['scale'] or '').lower()}".strip())
    named = _UNIT_IN_TEXT.fullmatch(plain) or _UNIT_IN_WORDS.fullmatch(plain)
    if named is None or not re.search(r"[0-9]", named["value"]):
        return Measure(plain, "")
    words = named["unit"].replace(".", "").lower().split()
    glued = not plain[len(named["value"]) :].startswith(" ")
    if _NO_UNITS & set(words) or (named.re is _UNIT_IN_WORDS and not _is_unit(words, glued)):
        return Measure(plain, "")
    return Measure(named["value"].strip(), _unit(words, named["power"] or ""))


def _is_unit(words: list[str], glued: bool) -> bool:
    if glued:
        return words[0] in _GLUED
    return any(word in _SHORT or (len(word) >= 4 and set(word) & set("aeiouy")) for word in words)


def _unit(words: list[str], power: str) -> str:
    singular = [word if word in _UNIT_NAMES else word.removesuffix("s") for word in words]
    names = [_UNIT_NAMES.get(word, word) for word in singular]
    if "unit" in names:
        return ""  # "square units" names none
    powers = {"2": "square ", "3": "cubic "}
    return powers.get(power.strip(" ^{}"), "") + " ".join(names)
