r"""The boxed answer: finding it and paying for its form, on honest and on hostile text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.accuracy import extract_boxed
from reward.boxed import find_boxes
from reward.style import format_reward


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ x }", "x"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{3 + \boxed{4}", "4"),
        (r"\boxed{a \\ b}", r"a \\ b"),
        (r"next line \\\boxed{6}", "6"),
        (r"over-escaped \\boxed{6}", "6"),
        ("\\boxed{\n1\n}", "1"),
        (r"}}} \boxed{1}", "1"),
        (r"\boxed{}", ""),
        (r"\boxed{4", None),
        (r"so $\boxed 5$", "5"),
        (r"so \(\boxed 1,234.5\)", "1,234.5"),
        ("\\boxed -7.\nDone", "-7"),
        (r"$\boxed5$", "5"),
        (r"\boxed C", "C"),
        (r"\boxed 5 + 3$", None),
        (r"\boxed 5 is my guess", None),
        (r"\boxedC", None),
        (r"\boxed{1} or $\boxed 2$", "2"),
        (r"$\boxed{12}$ where we put the answer in \boxed n", "12"),
        ("$\\boxed n$\nso $\\boxed{12}$", "12"),
        (r"$\boxed C$ or \boxed{12", "C"),
        (r"\fbox{4} {4} boxed{4}", None),
        ("", None),
    ],
)
def test_extract_boxed_returns_the_last_closed_box(text, content):
    assert extract_boxed(text) == content


# Balanced content without a box of its own.
BALANCED = st.recursive(
    st.text("ab1 +^\\,\n$é", max_size=5).map(lambda s: s.replace("\\", r"\pi ")),
    lambda inner: st.one_of(st.builds("{{{}}}".format, inner), st.builds("{}{}".format, inner, inner)),
    max_leaves=8,
)


@given(before=st.text("x{}\\ \n", max_size=20).filter(lambda s: not s.endswith("\\")), content=BALANCED)
def test_any_balanced_content_comes_back(before, content):
    assert extract_boxed(f"{before}\\boxed{{{content}}}") == content.strip()


@given(st.text("\\boxed{} ", max_size=60))
def test_spans_point_into_the_text(text):
    for box in find_boxes(text):
        assert text.startswith("\\boxed", box.start)
        content = box.content(text)
        if content is not None and box.braced:
            assert text[box.start : box.end].endswith("{" + content + "}")


@pytest.mark.parametrize(
    "response",
    [
        r"The answer is \boxed{42}.",
        r"$\boxed{\frac{1}{2}}$",
        "Thus\n\\[\n\\boxed{7}\n\\]\n",
        "$$\n\\boxed{7}.\n$$  \n\n",
        r"**\boxed{7}**",
        r"\boxed{5} is the final answer.",
        "\\boxed{\\begin{pmatrix}1\\\\\n2\\end{pmatrix}}",
        r"\boxed{<}",
    ],
)
def test_boxed_form_is_paid(response):
    assert format_reward(response) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "42",
        r"\boxed{42",
        r"\boxed{}",
        r"\boxed{ {} }",
        r"\boxed{1} or \boxed{2}",
        r"\boxed{\boxed{2}}",
        r"\boxed{1} and then \boxed{2",
        "\\boxed{42}\nNow let me check this again.",
        r"\boxed{42} " + "but " * 30,
        "",
    ],
)
def test_other_forms_are_not_paid(response):
    assert format_reward(response) == 0.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>\n2+2\n</think>\n\\boxed{4}", 1.0),
        ("  <think>maybe \\boxed{5}? no</think> So \\boxed{4}.", 1.0),
        ("\\boxed{4}", 0.0),
        ("<think></think>\\boxed{4}", 0.0),
        ("<think> \n</think>\\boxed{4}", 0.0),
        ("<think>a \\boxed{4}</think>", 0.0),
        ("<think>a</think>b</think>\\boxed{4}", 0.0),
        ("<think><think>a</think>\\boxed{4}", 0.0),
        ("</think>a<think>\\boxed{4}", 0.0),
        ("hello <think>a</think>\\boxed{4}", 0.0),
        ("<think>a</think>\\boxed{4} \\boxed{4}", 0.0),
    ],
)
def test_think_boxed_form(response, reward):
    assert format_reward(response, "think_boxed") == reward


def test_unknown_style_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'tags'.*boxed, think_boxed"):
        format_reward("", "tags")
