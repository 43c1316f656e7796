"""Answers that are known beforehand, judged by us and by lm-eval itself."""

from types import SimpleNamespace

import datasets
import pytest
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask

from ptl_rl.evaluation.harness import Generation, run_task
from ptl_rl.evaluation.tasks import TASKS, expected
from ptl_rl.verl_patches.lm_eval_tasks import task_definition


class Planted:
    """An lm-eval model that has its answers from a list."""

    rank, world_size = 0, 1
    generation_seconds = 3.0
    tokenizer = SimpleNamespace(chat_template="a template")

    def __init__(self, responses, truncated=()):
        self.responses, self.truncated = responses, truncated
        self.prompts = {}

    def generate_until(self, requests, disable_tqdm=False):
        self.prompts = {request.args[0]: request.doc_id for request in requests}
        self.settings = [request.args[1] for request in requests]
        return [self.responses[request.doc_id] for request in requests]

    def generation_of(self, prompt):
        index = self.prompts[prompt]
        return Generation(10, 7, index in self.truncated), False


def run(name, documents, responses, truncated=()):
    model = Planted(responses, truncated)
    result, rows = run_task(model, TASKS[name], documents, prompt=lambda question: f"<{question}>", max_tokens=50)
    return result, rows, model


def math(answer, index):
    return {"problem": f"Problem {index}?", "solution": f"so \\boxed{{{answer}}}", "answer": answer}


SAID = "Final Answer: The final answer is ${}$. I hope it is correct."
TEN = [
    ("12", SAID.format("12"), True),  # right
    ("12", SAID.format("13"), False),  # wrong
    (r"\frac{1}{2}", SAID.format(r"\frac{2}{4}"), True),  # an equivalent fraction
    (r"\frac{1}{2}", SAID.format("0.5"), True),  # as a decimal
    (r"5\text{ cm}", SAID.format("5"), True),  # without its unit
    ("[2,5)", SAID.format("[2,5)"), True),  # an interval
    ("[2,5)", SAID.format("(2,5)"), False),  # another one
    ("7", "First, 3 + 4 = 7, and now", False),  # truncated at the right number
    ("7", r"The result is \boxed{7}. To check", True),  # truncated after the answer
    ("1", "I cannot solve this.", False),
]


def test_ten_planted_answers_are_judged_rightly():
    documents = [math(answer, index) for index, (answer, _, _) in enumerate(TEN)]
    result, rows, _ = run("math500", documents, [response for _, response, _ in TEN], truncated=(7, 8))
    assert [bool(row.correct) for row in rows] == [right for _, _, right in TEN]
    assert [row.truncated for row in rows] == [index in (7, 8) for index in range(10)]
    assert result.accuracy == pytest.approx(0.6)
    assert result.truncated == 2
    assert result.seconds_per_solved == pytest.approx(3.0 / 6)
    assert result.low < 0.6 < result.high


GSM8K = [("18", "So 9 + 9 = 18. The answer is 18."), ("18", "The answer is $18.00."), ("1,200", "The answer is 1200."),
         ("3", "It must be 3"), ("3", "The answer is 4."), ("5", "5 apples and 6 pears")]  # fmt: skip


def test_scores_of_gsm8k_are_lm_evals_own():
    documents = [
        {"question": f"Question {index}?", "answer": f"so\n#### {answer}"} for index, (answer, _) in enumerate(GSM8K)
    ]
    responses = [response for _, response in GSM8K]
    result, rows, model = run("gsm8k", documents, responses)
    # lm-eval's own definition, with nothing changed but whose questions it asks.
    definition = task_definition("gsm8k/gsm8k-cot.yaml")
    definition.pop("tag")
    definition["custom_dataset"] = lambda **_: {"test": datasets.Dataset.from_list(documents)}
    plain_model = Planted(responses)
    plain = evaluator.evaluate(
        plain_model, {"tasks": {"gsm8k_cot": ConfigurableTask(config=definition)}}, bootstrap_iters=0
    )
    assert list(plain_model.prompts) == list(model.prompts)
    assert all(
        ours["until"] == theirs["until"] for ours, theirs in zip(model.settings, plain_model.settings, strict=True)
    )
    own = plain["results"]["gsm8k_cot"]
    assert result.lm_eval == {
        name: pytest.approx(own[name]) for name in ("exact_match,strict-match", "exact_match,flexible-extract")
    }
    assert 0 < result.lm_eval["exact_match,strict-match"] < result.lm_eval["exact_match,flexible-extract"] < 1
    assert [bool(row.correct) for row in rows] == [True, True, True, False, False, False]


def test_math_verify_is_lm_evals_own(monkeypatch):
    """Its module's ``process_results``, less the metric that needs another ANTLR."""
    documents = [math(answer, index) for index, (answer, _, _) in enumerate(TEN)]
    responses = [response for _, response, _ in TEN]
    result, _, _ = run("minerva_math", documents, responses)
    process_results = task_definition(TASKS["minerva_math"].definition)["process_results"]
    monkeypatch.setitem(process_results.__globals__, "is_equiv", lambda *_: False)
    own = [
        process_results(document, [response])["math_verify"]
        for document, response in zip(documents, responses, strict=True)
    ]
    assert 0 < sum(own) < len(own)
    assert result.lm_eval == {"math_verify,none": pytest.approx(sum(own) / len(own))}


MBPP = {
    "task_id": "601",
    "text": "Write a function to double a number.",
    "code": "def double(x):\n    return 2 * x",
    "test_list": ["assert double(1) == 2", "assert double(0) == 0", "assert double(-3) == -6"],
}
PROGRAMS = [
    ("def double(x):\n    return 2 * x\n", True),
    ("def double(x):\n    return x + 1\n", False),
    ("def double(x):\n    while True: pass\n", False),
    ("import sys\nsys.exit(0)\n", False),
    ("def double(x)\n", False),
]


def test_programs_run_confined_and_pass_or_not():
    from ptl_rl.evaluation.task_data import mbpp_document

    documents = [mbpp_document(MBPP | {"text": f"{MBPP['text']} {index}"}) for index in range(len(PROGRAMS))]
    result, rows, model = run("mbpp", documents, [program for program, _ in PROGRAMS])
    assert [bool(row.correct) for row in rows] == [passes for _, passes in PROGRAMS]
    assert result.lm_eval == {"pass_at_1,none": pytest.approx(0.2)}
    assert result.few_shot == 3
    assert all("[DONE]" in settings["until"] for settings in model.settings)
    assert all(row.prompt.count("[BEGIN]") == 4 for row in rows)


def test_zero_shot_questions_stand_in_their_prompt_alone():
    documents = [{"question": "2+2?", "answer": "4"}, {"question": "3+3?", "answer": "6"}]
    result, rows, model = run("boxed", documents, [r"it is \boxed{4}", "it is 6"])
    assert [row.prompt for row in rows] == ["<2+2?>", "<3+3?>"]
    assert [row.correct for row in rows] == [1.0, 0.0]
    assert [row.expected for row in rows] == ["4", "6"]
    assert result.lm_eval == {} and result.few_shot == 0
    assert model.prompts_are_rendered
    assert all(settings["max_gen_toks"] == 50 for settings in model.settings)


def test_expected_answers():
    assert expected({"question": "?", "answer": "1 + 1 = 2\n#### 2"}) == "2"
    assert expected(math("[2,5)", 0)) == "[2,5)"
