"""The guard: whatever a user's function does, verl gets a finite score and the same keys."""

import asyncio
import dataclasses
import inspect
import json
import logging
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.guard import as_result, guard, kinds_of

CALL = {
    "data_source": "math12k",
    "solution_str": "x" * 500,
    "ground_truth": "4",
    "extra_info": {"index": 17},
}


@pytest.mark.parametrize(
    ("value", "result"),
    [
        (0.5, {"score": 0.5, "acc": 0.5}),
        (True, {"score": 1.0, "acc": 1.0}),
        (np.float32(0.5), {"score": 0.5, "acc": 0.5}),
        (np.array(1), {"score": 1.0, "acc": 1.0}),
        (Fraction(1, 4), {"score": 0.25, "acc": 0.25}),
        ({"score": 1, "acc": np.bool_(True)}, {"score": 1.0, "acc": 1.0}),
        ({"score": 1.0, "pred": "x+1", "steps": [1, 2]}, {"score": 1.0, "pred": "x+1", "steps": "[1, 2]"}),
        ({"score": 1.0, "a": None, "b": math.nan}, {"score": 1.0, "a": None, "b": None}),
    ],
)
def test_what_verl_can_aggregate(value, result):
    assert as_result(value) == result
    assert all(type(v) in (float, str, type(None)) for v in as_result(value).values())


BAD = [None, "1.0", [1.0], (1.0, {}), np.zeros(2), math.nan, -math.inf, 10**400, 1j, {}, {"score": "1"}]


@pytest.mark.parametrize("value", [*BAD, {"score": None}, {"acc": 1.0}, {"score": math.nan}], ids=repr)
def test_a_wrong_return_scores_zero(value):
    assert guard(lambda **_: value)(**CALL) == {"score": 0.0, "reward_error": 1.0}


@pytest.mark.parametrize("error", [ValueError("no"), RecursionError(), SystemExit(1), AssertionError()])
def test_an_exception_scores_zero(error):
    def fails(**_):
        raise error

    assert guard(fails)(**CALL) == {"score": 0.0, "reward_error": 1.0}


def test_a_stop_from_outside_passes():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard(interrupted)(**CALL)


def test_arguments_reach_the_function_positionally_or_by_name():
    seen = []

    def function(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
        seen.append((data_source, solution_str, ground_truth, extra_info, kwargs))
        return 1.0

    guarded = guard(function)
    guarded("math", "text", "4", {"index": 1}, bonus=2)
    guarded(data_source="math", solution_str="text", ground_truth="4", bonus=2)
    assert seen == [
        ("math", "text", "4", {"index": 1}, {"bonus": 2}),
        ("math", "text", "4", None, {"bonus": 2}),
    ]
    assert guarded.__name__ == "function"


def flaky(data_source, solution_str, ground_truth, extra_info=None):
    """Keys and kinds differ from sample to sample, and some samples fail."""
    return eval(solution_str)  # test code: the sample says what to return


@given(
    st.lists(
        st.sampled_from(
            [
                "{'score': 1.0, 'acc': 1.0, 'pred': '7'}",
                "{'score': 1.0, 'acc': 'yes'}",
                "{'score': 0.0, 'pred': 7, 'surprise': 1}",
                "0.5",
                "1 / 0",
                "None",
            ]
        )
    )
)
def test_declared_keys_are_the_same_in_every_sample(samples):
    guarded = guard(flaky, keys={"acc": "number", "pred": "text"})
    logging.disable(logging.CRITICAL)
    results = [guarded("math", sample, "4") for sample in samples]
    logging.disable(logging.NOTSET)
    for sample, result in zip(samples, results, strict=True):
        assert list(result) == ["score", "acc", "pred", "reward_error"]
        assert isinstance(result["acc"], float | None)
        assert isinstance(result["pred"], str | None)
        failed = sample in ("1 / 0", "None")
        assert result["reward_error"] == float(failed)
        if failed:
            assert result == {"score": 0.0, "acc": 0.0, "pred": "", "reward_error": 1.0}


def test_undeclared_keys_are_learned():
    guarded = guard(flaky)
    assert guarded("math", "1/0", "4") == {"score": 0.0, "reward_error": 1.0}
    guarded("math", "{'score': 1, 'acc': 1, 'pred': 'a'}", "4")
    assert guarded("math", "1/0", "4") == {"score": 0.0, "acc": 0.0, "pred": "", "reward_error": 1.0}
    assert guarded("math", "{'score': 1, 'pred': 3}", "4") == {
        "score": 1.0,
        "acc": None,
        "pred": "3.0",
        "reward_error": 0.0,
    }


def test_kinds_leave_out_what_the_guard_adds():
    assert kinds_of({"score": 1.0, "acc": 1.0, "pred": "a", "b": None, "reward_error": 0.0}) == {
        "acc": "number",
        "pred": "text",
        "b": "number",
    }


def test_each_distinct_error_is_reported_once_with_its_sample(monkeypatch, tmp_path, caplog):
    path = tmp_path / "run" / "reward_errors.jsonl"
    monkeypatch.setenv("PTL_REWARD_ERRORS", str(path))

    def fails(data_source, solution_str, ground_truth, extra_info):
        if ground_truth == "4":
            raise ValueError(f"sample {extra_info['index']}")  # the message differs, the error does not
        return None

    guarded = guard(fails, name="fails of my_reward.py")
    for index in range(3):
        guarded(**{**CALL, "extra_info": {"index": index}})
    for _ in range(2):
        guarded(**{**CALL, "ground_truth": "5", "extra_info": None})

    first, second = map(json.loads, path.read_text().splitlines())
    assert first["function"] == "fails of my_reward.py"
    assert first["error"] == "ValueError: sample 0"
    assert first["place"].startswith(__file__)
    assert (first["data_source"], first["index"], first["response"]) == ("math12k", 0, "x" * 200)
    assert "returned a NoneType for a score" in second["error"]
    assert second["index"] is None
    assert len(caplog.records) == 2
    assert "fails of my_reward.py failed on data_source=math12k index=0" in caplog.text


def test_an_error_file_that_cannot_be_written_ends_nothing(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PTL_REWARD_ERRORS", str(tmp_path))  # a folder
    assert guard(lambda **_: None)(**CALL)["reward_error"] == 1.0
    assert "cannot append to PTL_REWARD_ERRORS" in caplog.text


def test_an_error_that_cannot_describe_itself_ends_nothing(caplog):
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def fails(**_):
        raise Mute

    assert guard(fails)(**CALL)["reward_error"] == 1.0
    assert "cannot describe an error" in caplog.text


def test_async_functions_stay_async():
    async def function(data_source, solution_str, ground_truth, extra_info=None):
        await asyncio.sleep(0)
        return 1 / (ground_truth != "4")

    guarded = guard(function)
    assert inspect.iscoroutinefunction(guarded)
    assert asyncio.run(guarded(**CALL)) == {"score": 0.0, "reward_error": 1.0}
    assert asyncio.run(guarded(**{**CALL, "ground_truth": "5"})) == {
        "score": 1.0,
        "acc": 1.0,
        "reward_error": 0.0,
    }


def test_a_cancelled_task_is_cancelled():
    async def slow(**_):
        await asyncio.sleep(60)

    async def cancel():
        task = asyncio.create_task(guard(slow)(**CALL))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())


def test_an_object_with_an_async_call_is_awaited():
    @dataclasses.dataclass
    class Judge:
        bonus: float

        async def __call__(self, **_):
            return self.bonus

    assert asyncio.run(guard(Judge(0.25))(**CALL))["score"] == 0.25


def test_a_forgotten_async_is_named(caplog):
    async def inner():
        return 1.0

    assert guard(lambda **_: inner())(**CALL)["reward_error"] == 1.0
    assert "declare the function itself with `async def`" in caplog.text
