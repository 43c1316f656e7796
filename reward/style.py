r"""Format reward: does the response end in one boxed answer?

A small reward for the form keeps the answer findable while the policy still gets most problems wrong, which
is the state right after pruning.
"""

from reward.boxed import Box, find_boxes

STYLES = ("boxed", "think_boxed")

# What may follow the box: the end of its sentence or of its display, not another paragraph.
_LONGEST_TAIL_CHARS = 64
_CLOSERS = ("$", r"\]", r"\)", "*", ".")


def format_reward(response: str, style: str = "boxed", think_opened: bool = False) -> float:
    r"""Return 1.0 if `response` has the wanted form, else 0.0.

    - `boxed`: the response holds exactly one `\boxed{...}`; it is closed, not empty, and at most 64
      characters of the same line follow it (closing `$`, `\]`, `\)`, `**` and `.` may stand on later lines).
    - `think_boxed`: `<think>` first, then reasoning that is not empty, then `</think>`, each tag once; what
      follows has the form `boxed`. Boxes inside the reasoning do not count. With `think_opened` the prompt has
      ended in `<think>`, and the response begins with the reasoning.

    Time is linear in the length of `response`. Raises ValueError for an unknown style.
    """
    if style == "boxed":
        return float(_ends_in_one_box(response))
    if style == "think_boxed":
        return float(_thinks_then_boxes("<think>" + response if think_opened else response))
    raise ValueError(f"unknown format_style {style!r}: use one of {', '.join(STYLES)}")


def _thinks_then_boxes(response: str) -> bool:
    if response.count("<think>") != 1 or response.count("</think>") != 1:
        return False
    before, _, rest = response.partition("<think>")
    reasoning, end_tag, answer = rest.partition("</think>")
    return bool(end_tag and not before.strip() and reasoning.strip()) and _ends_in_one_box(answer)


def _ends_in_one_box(text: str) -> bool:
    boxes = find_boxes(text)
    return len(boxes) == 1 and bool((boxes[0].content(text) or "").strip("{}$ \t\r\n")) and _is_last(text, boxes[0])


def _is_last(text: str, box: Box) -> bool:
    # rstrip on the slice and not on the text: the box may itself end in whitespace before its brace.
    tail = text[box.end :].rstrip()
    if len(tail) > _LONGEST_TAIL_CHARS:
        return False
    later_lines = "".join(tail.splitlines()[1:])
    for closer in _CLOSERS:
        later_lines = later_lines.replace(closer, "")
    return not later_lines.strip()
