r"""Texts of 300,000 characters of any repetition cost seconds and megabytes, whichever part of the reward reads them.

They are read in a child process, whose address space ends 256 MiB above what its imports took: a part that is
quadratic fails there, and takes no machine with it.
"""

import json
import subprocess
import sys

import pytest

# What is repeated; of two, the first stands as often in front of the second.
UNITS = {
    "nested": [["\\boxed{", "}"], ["{", "}"], ["\\text{", "}"], ["(", ")"], ["<think>", "</think>"], ["\\sqrt{1", "}"]],
    "braces": ["{", "}", "{}", "}{", "\\{", "{\\}"],
    "boxes": ["\\boxed{", "\\boxed{}", "\\boxed{1}", "\\boxed ", "\\boxed 5 ", "\\boxed 5$", "\\boxed5", "\\\\boxed{"],
    "boxes and spaces": ["\\boxed" + " " * 999, "\\boxed{" + " " * 999 + "}", "\\boxed 5" + " " * 999, "\\boxed{a}{"],
    "signs": ["\\", "\\\\", "$", "\\$", "$$", "\\(", "\\[", "^", "_", "=", "1=", "-", ",", "1,", ".", "1.", "(", "|"],
    "digits": ["9", "１", "٤", "1 ", "1e9", "1_2 ", "9^", "\\frac", "\\frac{1}{", "\\sqrt", "√", "²", "\\overline{3"],
    "letters": ["a", "a ", "é", "漢", "\U0001f600", "\u200b", "a\u0301", "\ufdfa", "İ", "\ud800", "\0"],
    "tags": ["<think>", "</think>", "<think></think>", "<think>\n", "<", "<think"],
    "lines": [" ", "\n", "\t", "\r\n", "\u2028", "x\n", "\n\n\\boxed{", "a b\n"],
    "fences": [
        "`",
        "```",
        "```\n",
        "```python\n",
        "```python\nx\n```\n",
        "````\n",
        "~~~\n",
        " ```\n",
        "- ```\n",
        "``` x",
    ],
    "statements": ["The answer is ", "the final answer is 1,", "The answer is 1\n", "#### 1\n", "answer: $1$ and "],
    "texts": ["\\text{", "\\text{and}", "\\text{ cm}", "and ", "or, ", " pi", "5 cm ", "\\left(", "\\approx", "**"],
    "units of measure": [
        "5\\text{m}",
        "5 m/s",
        "\\text{m}^2/",
        "\\text{(",
        "\\frac{\\text{m}",
        "\\mathrm{\\mu m^{-1} ",
    ],
    "lists and chains": ["12, ", "f(1,", "x=", "x_{", " million", "5 million ", "\\$-", "5/(\\text{m}"],
}
READ_ALL = r"""
import functools, json, resource, signal, sys
from reward import boxed

scanned, calls = functools.lru_cache(1)(boxed.find_boxes), []

def find_boxes(text):
    # Readers of one text share its scan: half of the time. None may scan again and again.
    calls.append(1)
    if len(calls) > 3:
        raise TimeoutError
    return scanned(text)

boxed.find_boxes = find_boxes

from ptl_rl.evaluation.final_answer import final_answer
from reward.accuracy import accuracy_reward, answers_equal
from reward.programs.reward import extract_program
from reward.style import format_reward

size, units = json.loads(sys.stdin.read())
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 256 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def ring(*_):
    raise TimeoutError

signal.signal(signal.SIGPROF, ring)

def think_boxed(text):
    return format_reward(text, "think_boxed")

def accuracy(text):
    return accuracy_reward(text, "7")

def as_long_as_its_gold(text):
    return answers_equal(text[:50_000], text[:50_000] + "1")

# What stands around the repetition, and who reads it.
readers = [
    ("{}", (format_reward, final_answer, extract_program, as_long_as_its_gold)),
    ("\\boxed{{{}}}", (format_reward, accuracy)),
    ("\\boxed{{1}} {}", (format_reward,)),
    ("\\boxed 5{}!", (accuracy,)),
    ("<think>{}</think>\\boxed{{1}}", (think_boxed,)),
    ("The answer is 1{}!", (final_answer,)),
    ("```python\n{}\n```", (extract_program,)),
]
failures = []
for unit in units:
    opening, closing = unit if isinstance(unit, list) else (unit, "")
    times = size // len(opening + closing)
    repetition = opening * times + closing * times
    for form, who in readers:
        text = form.format(repetition)
        for read in who:
            calls.clear()
            # The slowest takes 0.16 s on an idle core; joining all lines so far at every fence takes over a second.
            signal.setitimer(signal.ITIMER_PROF, 0.75 if read is as_long_as_its_gold else 0.9)
            try:
                read(text)
            except (MemoryError, TimeoutError) as error:
                failures.append(f"{read.__name__} of {form!r} around {unit!r}: {type(error).__name__}")
            signal.setitimer(signal.ITIMER_PROF, 0)
print(json.dumps(failures))
"""


@pytest.mark.parametrize("kind", UNITS)
def test_long_texts_of_anything_are_read_in_seconds_and_little_memory(kind):
    asked = json.dumps([300_000, UNITS[kind]])
    command = [sys.executable, "-c", READ_ALL]
    result = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == []
