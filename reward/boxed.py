r"""Find `\boxed{...}` in a response, in time and memory linear in its length.

Both the accuracy and the format reward need the boxes, and both read text that a policy under training wrote:
unbalanced, nested and repeated without end. A regular expression cannot match nested braces, and rescanning
from every opening is quadratic, so one pass with a stack serves both. A box is three offsets: the contents of
nested boxes, all copied, would be quadratic too.
"""

import re
from typing import NamedTuple

# `\\` is TeX's line break and `\{`, `\}` are printed braces: none of them opens or closes a group. A doubled
# backslash in front of `boxed` is taken for an over-escaped box, as the usual evaluation harnesses do.
# TeX boxes what follows `\boxed` without a brace, too: a number or letter counts where the formula ends behind it,
# the letter only where no box with braces is closed.
_TOKEN = re.compile(
    r"\\\\(?!boxed)|\\[{}]|\\boxed\s*\{|[{}]"
    r"|\\boxed\s*([+-]?\d[\d,]{0,40}(?:\.\d{1,40})?|(?<=\s)[A-Za-z])(?=[ \t]{0,9}\.?[ \t]{0,9}(?:\$|\\\)|\\\]|\n|\Z))"
)


class Box(NamedTuple):
    r"""One `\boxed{` of a text: offsets of its backslash, of its content, and behind its closing brace.

    `end` is None for a box that is never closed (a truncated response).
    """

    start: int
    content_start: int
    end: int | None
    braced: bool = True

    def content(self, text: str) -> str | None:
        """What the box holds, None if it is never closed."""
        return None if self.end is None else text[self.content_start : self.end - self.braced]


def find_boxes(text: str) -> list[Box]:
    r"""Return every `\boxed{` of `text` in order of its start, nested and truncated ones included."""
    boxes: list[Box] = []
    # Open groups: the index of the box, or None for a plain brace.
    open_groups: list[int | None] = []
    # Braces in front of the first box close nothing behind it.
    first = text.find("\\boxed")
    for token in _TOKEN.finditer(text, first) if first >= 0 else ():
        kind = token.group()
        if kind == "{":
            open_groups.append(None)
        elif kind == "}":
            index = open_groups.pop() if open_groups else None
            if index is not None:
                boxes[index] = boxes[index]._replace(end=token.end())
        elif token.group(1):
            boxes.append(Box(token.start(), token.start(1), token.end(1), braced=False))
        elif kind.endswith("{") and kind != r"\{":
            open_groups.append(len(boxes))
            boxes.append(Box(token.start(), token.end(), None))
    if any(box.braced and box.end is not None for box in boxes):
        return [box for box in boxes if box.braced or not text[box.content_start].isalpha()]
    return boxes
