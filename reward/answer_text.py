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
_NO_SPACE = re.compile(r"(?<!\\)\\!|(?<=[0-9])(?:\\,(?=[0-9]{3})|\{,\}(?=[0-9]{3}(?![0-9])))")
_SPACING = re.compile(r"(?<!\\)\\[!,;: ]|~|\\(?:quad|displaystyle)(?![A-Za-z])|\\(?:text|mbox|mathrm)\{ *\}")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")
_SIZED_DELIMITER = re.compile(r"\\(?:left|right|[bB]ig{1,2}[lr]?)(?![A-Za-z])")
_SIZED_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_FONT = re.compile(r"\\(?:boldsymbol|mathbf|bm|mathrm|underline|(?:text)?color\{[a-z]{1,20}\}) ?(?=\{)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\{([^{}\\]*)\}")
_AND = re.compile(r",? ?(?:\\(?:text|mbox)\{ ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])) ?")
_SCIENTIFIC = re.compile(
    r"([+-]?(?:[0-9]+\.[0-9]+(?=[eE])|[0-9]+(?=E[+-]?[0-9]|e\+?[0-9]|e-[0-9]{2})))[eE]\+?(-?[0-9]+)"
)
_SCIENTIFIC_OR_E = re.compile(r"([+-]?[0-9]+)e(-[0-9])")
_MIXED = re.compile(r"([+-]?[0-9]+) ([0-9]+)/([0-9]+)")
_REPEATING = re.compile(r"([+-]?)([0-9]{0,50})\.([0-9]{0,50})\\overline\{([0-9]{1,50})\}")
_PERCENT = re.compile(r"(?<=[0-9}]) ?(?:percent|\\text\{ ?percent\})$")
_CHOICE = re.compile(r"\(([A-Z])\)")
_SCALES = {
    **{"dozen": "12", "hundred": "100", "thousand": "1000", "million": "1000000"},
    **{"billion": "1000000000", "trillion": "1000000000000"},
}
_SCALE = "(?:" + "|".join(_SCALES) + ")s?(?![A-Za-z])"
_SCALED = re.compile(
    rf"(?<=[0-9}}]) ?(?P<font>\\(?:text|textrm|mbox|mathrm)\{{ ?)?(?P<scales>{_SCALE}(?: {_SCALE})*)(?(font) ?\}}?|)",
    re.I,
)


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
    choice = _CHOICE.fullmatch(plain)
    return choice.group(1) if choice else _SCALED.sub(_times_scales, plain)


def _times_scales(number_words: re.Match[str]) -> str:
    scales = "".join(rf"\times {_SCALES[word.removesuffix('s')]}" for word in number_words["scales"].lower().split())
    return scales if number_words.group().endswith("}") else scales + (number_words["font"] or "")


def in_one_form(plain: str, e_is_ten: bool) -> str:
    r"""Bring a value without its unit to LaTeX: `1.5e3`, `3 1/2` and repeating decimals.

    `2e-1` is a power of ten only with `e_is_ten`: it may be twice e, less one.
    """
    scientific = _SCIENTIFIC.fullmatch(plain) or (_SCIENTIFIC_OR_E.fullmatch(plain) if e_is_ten else None)
    mixed, repeating = _MIXED.fullmatch(plain), _REPEATING.fullmatch(plain)
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
    return plain


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
    **{"ml": "milliliter", "l": "liter", "L": "liter", "litre": "liter", "deg": "degree", "usd": "dollar"},
    **{"celsius": "C", "fahrenheit": "F", "kelvin": "K", "N": "newton", "J": "joule", "W": "watt", "V": "volt"},
    **{"hz": "hertz", "pa": "pascal", "Å": "angstrom", "Ω": "ohm"},
}  # fmt: skip
_UNIT_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3}
_GLUED = {
    "cm", "mm", "km", "kg", "ft", "lb", "lbs", "hr", "hrs",
    "mph", "kph", "min", "sec", "ml", "degrees", "pm", "am",
}  # fmt: skip
_SHORT = _GLUED | {"m", "s", "in", "yd", "oz", "mi", "usd", "day", "days", "mg", "å"}
GREEK = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu",
    "xi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega",
)  # fmt: skip
NUMBER_WORDS = {
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty",
    "fifty", "sixty", "seventy", "eighty", "ninety", "dozen", "hundred", "thousand", "million", "billion", "trillion",
    "half", "halve", "third", "quarter", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth", "sixteenth", "twentieth", "hundredth", "thousandth", "millionth", "billionth",
}  # fmt: skip
# Words that belong to the value.
_NO_UNITS = NUMBER_WORDS | set(GREEK) | {
    "pi", "sqrt", "frac", "sin", "cos", "tan", "log", "ln", "exp", "mod", "modulo", "choose", "inf", "infinity",
    "not", "no", "factorial", "over", "plus", "minus", "than", "multiplied", "divided", "power", "root",
    "if", "unless", "when", "except", "bn", "mn", "mln", "e", "i", "x", "y", "z",
}  # fmt: skip
_VALUE = r"(?P<value>.*[0-9)}\]]) ?"
_FONTS = r"\\(?:text|textrm|mathrm|mbox|textbf|operatorname)"
_EXPONENT = r"-?[0-9]{1,3}(?:/[0-9]{1,3})?"
_POWER = rf"\^ ?(?:{_EXPONENT}|\{{ ?{_EXPONENT} ?\}})"
_GROUP = rf"{_FONTS}\{{(?:[A-Za-zÅµμΩ. /()*-]|\\(?:cdot|mu|Omega|AA)(?![A-Za-z])|{_POWER})*\}}(?: ?{_POWER})?"
_GROUPS = rf"{_GROUP}(?:(?: |\\cdot ?)?{_GROUP})*"
_UNIT_FACTOR = re.compile(rf"{_GROUP}|\\frac\{{{_GROUPS}\}}\{{{_GROUPS}\}}")
_BETWEEN_FACTORS = re.compile(r"(?:[ /*()]|\\(?:cdot|times)(?![A-Za-z]))*")
_UNIT_IN_WORDS = re.compile(_VALUE + rf"(?P<unit>[A-Za-zÅ][A-Za-zÅ./ ]*(?:{_POWER})?)", re.S)
_UNIT_SIGNS = {r"\mu": "µ", "μ": "µ", r"\Omega": "Ω", r"\AA": "Å"}
_UNIT_SIGN = re.compile(r"(\\mu|μ|\\Omega|\\AA) ?")
_UNIT_TOKEN = re.compile(rf"\^{_EXPONENT}|[/()]|[A-Za-zÅµΩ]+")
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
        amount = plain[money.end() :]
        value = amount if _CURRENCY.match(amount) else measure(amount).value
        return Measure(money.group(1) + value, _CURRENCIES[money.group(2)])
    degrees = _DEGREES.fullmatch(plain)
    if degrees and re.search(r"[A-Za-z]", degrees["value"]) is None:
        return Measure(degrees["value"], _unit(f"degree {degrees['scale'] or ''}"))
    value = _before_unit_in_text(plain)
    in_words = _UNIT_IN_WORDS.fullmatch(plain) if value == plain else None
    if in_words:
        value = in_words["value"].strip()
    unit = _without_fonts(plain[len(value) :])
    words = [word.lower() for word in re.findall(r"[A-Za-zÅµΩ]+", unit)]
    if not words or not re.search(r"[0-9]", value) or not _is_unit(words):
        return Measure(value if not unit.strip() else plain, "")
    if in_words and not _is_unit_in_words(words, plain[len(value)] != " ", "/" in unit):
        return Measure(plain, "")
    return Measure(value, _unit(unit))


def _before_unit_in_text(plain: str) -> str:
    r"""What stands before the product or quotient of `\text{...}` at the end, which may be all of `plain`."""
    start = end = len(plain)
    for factor in reversed(list(_UNIT_FACTOR.finditer(plain))):
        if not _BETWEEN_FACTORS.fullmatch(plain, factor.end(), end):
            break
        start = end = factor.start()
    value = plain[:start].rstrip(" (/*")
    for sign in (r"\cdot", r"\times"):
        value = value.removesuffix(sign).rstrip()
    unit = plain[len(value) :]
    return value if start < len(plain) and unit.count("(") == unit.count(")") else plain


def _without_fonts(unit: str) -> str:
    r"""A unit without `\text` and braces; powers as in `^-1`, a fraction as `(m)/(s)`."""
    unit = re.sub(rf"\^ ?\{{ ?({_EXPONENT}) ?\}}", r"^\1", unit)
    unit = re.sub(_FONTS + r"\{([^{}]*)\}", r" \1 ", _UNIT_SIGN.sub(_one_sign, unit))
    return re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", unit).replace(r"\cdot", " ").replace(r"\times", " ")


def _one_sign(sign: re.Match[str]) -> str:
    return _UNIT_SIGNS[sign.group(1)]


def _is_unit(words: list[str]) -> bool:
    known = {word.removesuffix("s") for word in words} | set(words)
    return not known & _NO_UNITS and words[0] not in ("squared", "cubed") and "times" not in words[:-1]


def _is_unit_in_words(words: list[str], glued: bool, is_quotient: bool) -> bool:
    if glued:
        return words[0] in _GLUED and not is_quotient
    if any(len(word) == 1 and word not in _UNIT_NAMES for word in words):
        return False
    is_long = [len(word) >= 4 and bool(set(word) & set("aeiouy")) for word in words]
    if is_quotient:
        known = all(long or word in _UNIT_NAMES or word in _SHORT for word, long in zip(words, is_long, strict=True))
        return known and (max(map(len, words)) > 1 or words == ["m", "s"])
    return any(word in _SHORT or long for word, long in zip(words, is_long, strict=True))


def _unit(text: str) -> str:
    """The unit in one form: names in the order of the alphabet, with their powers. That of "square units" is empty."""
    powers: dict[str, Fraction] = {}
    outer = [1]  # the signs of the brackets that are open
    sign, power, name = 1, 1, ""
    expanded = re.sub(r"(?i)\bmph\b", "mi/h", re.sub(r"(?i)\bkph\b", "km/h", text))
    for token in _UNIT_TOKEN.findall(expanded):
        word = token.lower()
        if token.startswith("^") or word in ("squared", "cubed"):
            if name:
                powers[name] *= _UNIT_POWERS.get(word) or Fraction(token[1:])
        elif word in ("/", "per"):
            sign = -1
        elif token == "(":
            outer.append(outer[-1] * sign)
            sign = 1
        elif token == ")":
            outer = outer[:-1] or [1]
        elif word in _UNIT_POWERS:
            power = _UNIT_POWERS[word]
        else:
            name = _unit_name(token)
            powers[name] = powers.get(name, 0) + Fraction(outer[-1] * sign * power)
            sign, power = 1, 1
    return "" if "unit" in powers else " ".join(sorted(name if n == 1 else f"{name}^{n}" for name, n in powers.items()))


def _unit_name(word: str) -> str:
    if len(word) <= 3:  # "MW" is not "mW", nor "ms" "m"
        short = word if len(word) == 1 else word.lower()
        return _UNIT_NAMES.get(short) or _UNIT_NAMES.get(short.removesuffix("s") if len(word) == 3 else "") or word
    name = word.lower()
    singular = name if name in _UNIT_NAMES else name.removesuffix("s")
    return _UNIT_NAMES.get(singular, singular)
