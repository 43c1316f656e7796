r"""Find `\boxed{...}` in a response, in time linear in its length.

Both the accuracy and the format reward need the boxes, and both read text that a policy under training wrote:
unbalanced, nested and repeated without end. A regular expression cannot match nested braces, and rescanning
from every opening is quadratic, so one pass with a stack serves both.
"""

import re
from typing import NamedTuple

# `\\` is TeX's line break and `\{`, `\}` are printed braces: none of them opens or closes a group. A doubled
# backslash in front of `boxed` is taken for an over-escaped box, as the usual evaluation harnesses do.
_TOKEN = re.compile(r"\\\\(?!boxed)|\\[{}]|\\boxed\s*\{|[{}]")


class Box(NamedTuple):
    r"""One `\boxed{`: `start` is the offset of its first character, `end` the offset after its brace.

    `end` and `content` are None for a box that is never closed (a truncated response).
    """

    start: int
    end: int | None
    content: str | None


def find_boxes(text: str) -> list[Box]:
    r"""Return every `\boxed{` of `text` in order of its start, nested and truncated ones included."""
    boxes: list[Box] = []
    # Open groups: the index of the box and the offset of its content, or None for a plain brace.
    open_groups: list[tuple[int, int] | None] = []
    for token in _TOKEN.finditer(text):
        kind = token.group()
        if kind == "{":
            open_groups.append(None)
        elif kind == "}":
            group = open_groups.pop() if open_groups else None
            if group is not None:
                index, content_start = group
                content = text[content_start : token.start()]
                boxes[index] = Box(boxes[index].start, token.end(), content)
        elif kind.endswith("{") and kind != r"\{":
            open_groups.append((len(boxes), token.end()))
            boxes.append(Box(token.start(), None, None))
    return boxes
