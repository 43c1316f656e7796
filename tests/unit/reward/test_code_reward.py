"""The code reward on ordinary programs: what is a program, what is a test, and what each is paid."""

import asyncio
import json
import random
import re
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import pytest

from reward import user
from reward.check import RewardError, check_reward_function
from reward.mbpp import main, mbpp_row
from reward.programs import reward
from reward.programs.reward import code_reward, compute_score, extract_program, partial_score
from reward.programs.unit_tests import plan_tests
from reward.programs.values import Opaque, Raised, decode, encode, encode_error

TESTS = ["assert square(2) == 4", "assert square(-3) == 9", "assert square(0) == 0"]
RIGHT = "I multiply.\n```python\ndef square(x):\n    return x * x\n```\nDone."
HALF = "```python\ndef square(x):\n    return x + x\n```"


def keys(score, **others):
    empty = {"acc": 0.0, "passed": 0.0, "no_program": 0.0, "timeout": 0.0, "crashed": 0.0}
    return {"score": pytest.approx(score), **empty, **others}


def test_all_tests_or_nothing_unless_partial():
    assert code_reward(RIGHT, TESTS) == 1.0
    assert code_reward(HALF, TESTS) == 0.0
    assert code_reward(HALF, TESTS, partial=True) == pytest.approx(2 / 3)
    assert compute_score("mbpp", HALF, TESTS) == keys(0.0, passed=pytest.approx(2 / 3))
    assert partial_score("mbpp", HALF, TESTS) == keys(2 / 3, passed=pytest.approx(2 / 3))
    assert compute_score("mbpp", RIGHT, json.dumps(TESTS), {"index": 0}) == keys(1.0, acc=1.0, passed=1.0)


def test_how_a_program_ended_is_a_number_of_its_own():
    assert compute_score("mbpp", "no code", TESTS) == keys(0.0, no_program=1.0)
    assert compute_score("mbpp", "```python\nimport os; os._exit(0)\n```", TESTS) == keys(0.0, crashed=1.0)
    slow = "```python\ndef square(x):\n    if x < 0: import time; time.sleep(9)\n    return x * x\n```"
    assert compute_score("mbpp", slow, TESTS, wall_seconds=0.5) == keys(0.0, passed=pytest.approx(1 / 3), timeout=1.0)
    assert compute_score("mbpp", "```python\ndef square(x) return\n```", TESTS) == keys(0.0)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```\ntext\n```py\nb\n\nc\n```", "b\n\nc"),
        ("```\na\n```", "a"),
        ("  ```Python3 title=x\na\n  ```  ", "a"),
        ("```python\na\n```\n```python\ncut sho", "a"),
        ("```python\na\n```\n```bash\nls\n```", "a"),
        ("```\nstray\n```python\na\n```", "a"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("```python\r\na\r\n```\r\n", "a\r"),
        ("1. So:\n   ```python\n   def f():\n       return 1\n\n   ```\n", "def f():\n    return 1\n"),
        ("  ```\n    a\n b\n  ```", "  a\nb"),
        ("```python\ncut sho", None),
        ("def f(): pass", None),
        ("inline ```python a``` code", None),
        ("```python a```\n", None),
        ("```text\na\n```", None),
    ],
)
def test_the_program_is_the_last_closed_block_of_python(text, program):
    assert extract_program(text) == program


def test_long_lines_cost_linear_time():
    assert extract_program(("```" + " " * 10**6 + "`\n") * 3) is None


def test_bare_code_is_a_program_only_if_asked_for():
    bare = "def square(x):\n    return x * x"
    assert code_reward(bare, TESTS) == 0.0
    assert code_reward(bare, TESTS, raw_code=True) == 1.0
    assert code_reward("```python\n" + bare, TESTS, raw_code=True) == 0.0


@pytest.mark.parametrize(
    ("ground_truth", "message"),
    [
        ("", "holds no assert"),
        ("x = 1", "holds no assert"),
        ("assert f(1) ==", "ground truth is not valid Python"),
        ("assert f(1) == 1\nx = 2\nassert f(x) == 2", "line 2 of the ground truth is no assert"),
        ("{'tests': ['assert f(1) == 1']}", "not valid JSON.*with double quotes"),
        ("[1, 2", "not valid JSON"),
        ('{"test": ["assert f(1) == 1"]}', r"unknown keys \['test'\]"),
        ('{"setup": "x = 1"}', "has no 'tests'"),
        ("[]", "must be a list of statements"),
        ("[1]", "must be a list of statements"),
        ({"tests": ["assert f() == 1"], "setup": ["x = 1"]}, "setup of the ground truth must be text"),
        ({"tests": ["assert f() == 1"], "entry": 3}, "entry of the ground truth must be a name"),
        (["assert f(1) == 1", "assert f(2 == 2"], "test 2 is not valid Python"),
        (["assert f(1) == 1", "assert True"], "test 2 uses nothing of the program"),
        (["assert sum([1]) == 1"], "name its function in 'entry'"),
        (None, "must be a list of statements"),
    ],
)
def test_malformed_ground_truths_are_errors_whatever_the_response(ground_truth, message):
    with pytest.raises(ValueError, match=message):
        code_reward("no program", ground_truth)


def test_ground_truth_may_be_plain_text_with_setup_before_its_asserts():
    text = "import math\nassert math.isclose(square(1.5), 2.25)\nassert square(2) == 4, 'message'"
    assert code_reward(RIGHT, text) == 1.0
    assert code_reward(HALF, text, partial=True) == 0.5


@pytest.mark.parametrize(
    ("test", "calls", "judge"),
    [
        ("assert f(2, [1]) == 4", ("f(2, [1])",), "__value__(0) == 4"),
        ("assert 4 == f(g(2))[0].real", ("f(g(2))[0].real",), "4 == __value__(0)"),
        ("assert sorted(f(x)) == [1]", ("f(x)",), "sorted(__value__(0)) == [1]"),
        ("assert not f(1), 'why'", ("f(1)",), "not __value__(0)"),
        ("assert f(1) is None or f(1).a == 2", ("f(1)", "f(1).a"), "__value__(0) is None or __value__(1) == 2"),
        ("assert f(lambda a: a + 1) == 2", ("f(lambda a: a + 1)",), "__value__(0) == 2"),
        ("assert f(1) == 1; assert f(2) == 2", ("f(1)", "f(2)"), "__value__(0) == 1 and __value__(1) == 2"),
        ("assert all(f(a) == b for a, b in cases)", (), ""),
        ("assert isinstance(f(1), Point)", (), ""),
        ("assert f(1) == Point(2)", (), ""),
        ("try:\n    f(1)\n    assert False\nexcept ValueError as error:\n    pass", (), ""),
    ],
)
def test_expected_values_go_to_the_judge_and_calls_to_the_program(test, calls, judge):
    names = [name for name in ("f", "g", "x", "cases", "Point") if name in test]
    (unit,) = plan_tests({"tests": [test], "entry": names}).tests
    assert (unit.calls, unit.judge, bool(unit.whole)) == (calls, judge, not calls)


def test_tests_that_cannot_be_split_still_count():
    tests = [
        "assert all(square(a) == b for a, b in [(1, 1), (2, 4)])",
        "assert square(2) == square(-2)",
        "x = square(3)\nassert x == 9",
        "try:\n    square('a')\n    assert False\nexcept TypeError as error:\n    pass",
        "assert callable(square)",
    ]
    assert code_reward(RIGHT, tests) == 1.0
    assert code_reward(HALF, tests, partial=True) == pytest.approx(1 / 5)


def test_setup_runs_after_the_program_and_where_it_is_needed():
    program = "```python\nclass Node:\n    def __init__(self, v): self.v, self.next = v, None\ndef last(n):\n"
    program += "    return last(n.next) if n.next else n.v\n```"
    setup = "import math\nroot = Node(1)\nroot.next = Node(2)\nTWO = math.sqrt(4)"
    truth = {"tests": ["assert last(root) == TWO"], "setup": setup, "entry": ["Node", "last"]}
    plan = plan_tests(truth)
    assert plan.tests[0].calls == ("last(root)",)
    assert plan.judge_setup == "import math\nTWO = math.sqrt(4)"
    assert code_reward(program, truth) == 1.0


def test_a_setup_that_fails_by_itself_is_an_error_and_no_zero():
    with pytest.raises(ValueError, match=r"setup of the ground truth fails by itself \(ModuleNotFoundError"):
        code_reward(RIGHT, {"tests": TESTS, "setup": "import no_such_module"})
    truth = {"tests": ["assert g() == 1"], "setup": "x = square(1)", "entry": ["square", "g"]}
    assert code_reward("```python\npass\n```", truth) == 0.0


def test_values_of_the_setup_stay_with_the_referee():
    setup = "cases = [(1, 2)]\ndef key(x): return x\nlow = 0"
    tests = ["assert f(cases[0][0]) == cases[0][1]", "assert f(key) == 2", "assert f(lambda x: x > low) == 3"]
    plan = plan_tests({"tests": tests, "setup": setup})
    assert plan.first == ()
    assert [test.inputs for test in plan.tests] == [("cases[0][0]",), ("key",), ("lambda x: x > low",)]
    assert [test.calls for test in plan.tests] == [("f(__input__(0))",)] * 3
    needed = [[plan.setup[number].split("\n")[0] for number in test.needs] for test in plan.tests]
    assert needed == [["cases = [(1, 2)]"], ["def key(x):"], ["low = 0"]]  # the first is plain, so it needs nothing


def test_short_circuits_and_names_of_built_in_functions():
    program = "```python\ndef sum(a, b=0):\n    return None if a > 1 else [a][b]\n```"
    truth = {"tests": ["assert sum(2) is None or sum(2).x == 1", "assert sum(1) == 1", "assert sum(1, 9) == 1"]}
    assert code_reward(program, truth | {"entry": "sum"}, partial=True) == pytest.approx(2 / 3)


UTC = timezone.utc


class Colour(IntEnum):
    RED = 1


Pair = namedtuple("Pair", "a b")
VALUES = [
    *(None, True, 0, -(2**60), 10**5000, 0.1, float("inf"), 1 + 2j, "é\ud800", b"\xff", bytearray(b"a")),
    *([1, [2.5, ("a",)]], (), {"a": [1], (1, 2): None}, {1, "b"}, frozenset({(1,)}), range(3, 10**30, 2)),
    *(Colour.RED, Pair(1, [2]), Counter("aab"), defaultdict(lambda: 1, {2: 3}), OrderedDict(a=1), deque([1, 2], 5)),
    *(date(2024, 2, 29), datetime(2024, 1, 2, 3, 4, 5, 6, UTC), timedelta(-1, 2, 3)),
    *(Fraction(1, 3), Decimal("0.10"), {"a": 1}.keys(), {"a": 1}.items()),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_data_crosses_unchanged(value):
    copy = decode(json.loads(json.dumps(encode(value))))
    assert copy == value and value == copy
    assert type(copy).__module__ in ("builtins", "collections", "fractions", "decimal", "datetime")


def test_iterators_arrive_as_iterators_and_objects_as_nothing_in_particular():
    def carry(value):
        return decode(json.loads(json.dumps(encode(value))))

    assert list(carry(x * x for x in range(3))) == list(carry(map(abs, [0, 1, 4]))) == [0, 1, 4]
    assert sorted(carry({"a": 1}.values())) == [1]
    match = carry(re.match("a", "a"))
    assert isinstance(match, Opaque) and match and match != re.match("a", "a")
    assert not carry(type("Empty", (), {"__len__": lambda self: 0})())
    with pytest.raises(Raised, match="NameError"):
        decode(encode_error("NameError: x"))
    for forged in (["fraction", ["1e999999999"]], ["decimal", "1e999999999"], ["complex", ["1e9"]], ["date", ["1"]]):
        with pytest.raises((ValueError, TypeError)):
            decode(forged)
    with pytest.raises(ValueError, match="unknown kind"):
        decode(["code", "x"])
    cycle = []
    cycle.append(cycle)
    with pytest.raises((RecursionError, ValueError)):
        encode(cycle)


def test_settings_that_do_not_exist_are_errors():
    with pytest.raises(TypeError, match=r"\['cpu_second'\]: there are partial, raw_code.*cpu_seconds"):
        compute_score("mbpp", RIGHT, TESTS, cpu_second=1)
    with pytest.raises(ValueError, match="limits must be positive"):
        code_reward(RIGHT, TESTS, wall_seconds=0)
    assert compute_score("mbpp", RIGHT, TESTS, reward_router_address=None)["score"] == 1.0


@pytest.mark.parametrize("name", ["compute_score", "partial_score"])
def test_a_recipe_can_name_the_file(name):
    sample = {"data_source": "mbpp", "solution_str": RIGHT, "ground_truth": json.dumps({"tests": TESTS})}
    check_reward_function(reward.__file__, name, sample)
    with pytest.raises(RewardError, match="not valid JSON"):
        check_reward_function(reward.__file__, name, sample | {"ground_truth": "{"})
    result = asyncio.run(user.compute_score(**sample, user_path=reward.__file__, user_name=name))
    assert result == keys(1.0, acc=1.0, passed=1.0, reward_error=0.0)


def test_a_forked_child_does_not_wait_for_its_parents_slots():
    script = (
        "import os, threading, time\n"
        "from reward.programs.reward import code_reward\n"
        "slow = '```python\\nimport time; time.sleep(3)\\n```'\n"
        "ask = lambda text: code_reward(text, 'assert f() == 1', workers=1)\n"
        "threading.Thread(target=ask, args=(slow,), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "start = time.monotonic()\n"
        "if os.fork() == 0:\n"
        "    right = ask('```python\\ndef f(): return 1\\n```') == 1.0\n"
        "    os._exit(0 if right and time.monotonic() - start < 2 else 1)\n"
        "assert os.wait()[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


# MBPP.

RECORD = {"task_id": 7, "text": "Square it.", "code": "def square(x):\r\n    return x*x", "test_list": TESTS}


def test_an_mbpp_record_becomes_a_row(tmp_path):
    row = mbpp_row({**RECORD, "challenge_test_list": ["assert square(9) == 81"]}, challenge=True)
    assert row["question"].startswith("Square it.") and all(test in row["question"] for test in TESTS)
    assert "square(9)" not in row["question"] and "square(9)" in row["answer"]
    assert json.loads(row["answer"])["entry"] == ["square"]
    assert code_reward(row["solution"], row["answer"]) == 1.0
    with pytest.raises(ValueError, match="MBPP task 7: no 'code'"):
        mbpp_row({"task_id": 7, "text": "", "test_list": []})
    with pytest.raises(ValueError, match="MBPP task 7: test 1 uses nothing"):
        mbpp_row(RECORD | {"test_list": ["assert True"]})
    (tmp_path / "in.jsonl").write_text(json.dumps(RECORD | {"split": "train"}) + "\n")
    main(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "train")
    assert json.loads((tmp_path / "out.jsonl").read_text())["id"] == "mbpp/7"


def test_mbpp_references_pass_and_mutants_fail(repository):
    path = repository.parent / "shared" / "data" / "mbpp_train_val.jsonl"
    if not path.exists():
        pytest.skip("MBPP is not on this machine")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [mbpp_row(record) for record in records]
    assert all("__value__" in t.judge or t.whole for row in rows for t in plan_tests(row["answer"]).tests)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda row: code_reward(row["solution"], row["answer"]), rows[:40])) == [1.0] * 40
        mutants = [row["solution"].replace("return ", "return not ") for row in random.Random(0).sample(rows, 20)]
        scores = pool.map(code_reward, mutants, [row["answer"] for row in random.Random(0).sample(rows, 20)])
        assert sum(scores) == 0.0
