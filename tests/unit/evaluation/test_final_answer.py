import pytest

from ptl_rl.evaluation.final_answer import final_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("4 + 5 = 9. The answer is 9.", "9"),
        ("The answer is $1,234.50.\n\nQ: another?", "1,234.50"),
        (r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.", r"$\frac{1}{2}$"),
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "$[2,5)$"),
        (r"so $x = \boxed{\frac{3}{4}}$. The answer is 7.", r"\frac{3}{4}"),
        ("The answer is 3. No: the answer is 4.", "4"),
        ("The answer is 9. That is because 4.5 + 4.5 = 9.", "9"),
        ("The answer is 18 dollars.", "18"),
        ("The answer is $18 dollars a day.", "18"),
        ("The answer is **1,234** eggs.", "1,234"),
        ("The answer is €18.", "18"),
        ("The answer is 18, which is less than 20.", "18"),
        ("The answer is 18 years old.", "18"),
        ("The answer is 25% of it.", "25%"),
        ("The answer is -3.5 degrees.", "-3.5"),
        ("The answer is 3/4 cups.", "3/4"),
        ("The answer is 2x + 1.", "2x + 1"),
        ("The answer is 2^5.", "2^5"),
        ("The answer is 3, 4 and 5.", "3, 4 and 5"),
        ("The answer is (2, 3).", "(2, 3)"),
        ("The answer is", None),
        ("we get 3 + 4 = 7, then 7 * 2", None),
        ("", None),
    ],
)
def test_only_a_stated_answer_counts(response, answer):
    assert final_answer(response) == answer
