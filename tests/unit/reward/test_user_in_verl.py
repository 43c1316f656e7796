"""The files as verl loads and calls them: by path, with reward_kwargs, from its reward manager."""

import asyncio
import inspect
import textwrap
import threading

import pytest

from reward import compute_score as builtin
from reward import user
from reward.load import RewardError

RESPONSE = r"So \boxed{\frac{8}{2}}"


def score(**kwargs):
    return asyncio.run(user.compute_score("math", RESPONSE, "4", {"index": 0}, **kwargs))


@pytest.fixture
def my_reward(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(
        textwrap.dedent("""
        import threading
        loads = []
        def brevity(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
            if data_source == "broken":
                raise ValueError("broken sample")
            main = threading.current_thread() is threading.main_thread()
            return {"score": scale / len(solution_str), "in_main_thread": main}
        async def served(data_source, solution_str, ground_truth, extra_info=None):
            return 0.75
        """)
    )
    return str(path)


def test_without_a_users_file_the_built_in_reward_is_used():
    assert score() == {"score": 1.0, "acc": 1.0, "format": 1.0, "reward_error": 0.0}
    assert score(accuracy_weight=0.5)["score"] == 0.6


def test_a_failing_built_in_reward_keeps_its_keys():
    result = asyncio.run(user.compute_score("math", RESPONSE, ""))
    assert result == {"score": 0.0, "acc": 0.0, "format": 0.0, "reward_error": 1.0}


def test_a_users_function_gets_its_settings_off_the_main_thread(my_reward):
    result = score(user_path=my_reward, user_name="brevity", scale=len(RESPONSE))
    assert result == {"score": 1.0, "in_main_thread": 0.0, "reward_error": 0.0}


def test_a_users_async_function_is_awaited(my_reward):
    assert score(user_path=my_reward, user_name="served") == {"score": 0.75, "acc": 0.75, "reward_error": 0.0}


def test_the_users_file_is_loaded_once_per_process(my_reward):
    first = user._guarded(my_reward, "brevity", None)
    assert user._guarded(my_reward, "brevity", None) is first
    assert user._guarded(my_reward, "served", None) is not first


def test_a_file_that_cannot_be_loaded_is_an_error_and_no_zero(my_reward):
    with pytest.raises(RewardError, match="did you mean 'brevity'"):
        score(user_path=my_reward, user_name="brevty")


# What follows needs verl itself, which the reward files do not.


def load_through_verl(path, reward_kwargs):
    omegaconf = pytest.importorskip("omegaconf")
    reward = pytest.importorskip("verl.trainer.ppo.reward")
    function = {"path": path, "name": "compute_score", "reward_kwargs": reward_kwargs}
    return reward.get_custom_reward_fn(omegaconf.OmegaConf.create({"reward": {"custom_reward_function": function}}))


def test_verl_loads_the_built_in_file_by_path():
    function = load_through_verl(builtin.__file__, {"format_weight": 0.2})
    assert not inspect.iscoroutinefunction(function)
    results = []
    call = {"data_source": "math", "solution_str": RESPONSE, "ground_truth": "4", "extra_info": {}}
    thread = threading.Thread(target=lambda: results.append(function(**call)))
    thread.start()
    thread.join()
    assert results == [{"score": pytest.approx(1.1), "acc": 1.0, "format": 1.0}]


def test_verl_averages_what_the_guard_returns_even_where_samples_fail(my_reward):
    metrics = pytest.importorskip("verl.trainer.ppo.metric_utils")
    keys = {"in_main_thread": "number"}
    settings = {"user_path": my_reward, "user_name": "brevity", "user_keys": keys, "scale": len(RESPONSE)}
    function = load_through_verl(user.__file__, settings)
    assert inspect.iscoroutinefunction(function)

    async def both():
        call = {"solution_str": RESPONSE, "ground_truth": "4", "extra_info": {"index": 1}}
        return [await function(data_source=source, **call) for source in ("math", "broken")]

    results = asyncio.run(both())
    assert results[0].keys() == results[1].keys() == {"score", "in_main_thread", "reward_error"}
    infos = {key: [result[key] for result in results] for key in results[0]}
    means = metrics.process_validation_metrics(["math", "math"], ["a", "b"], infos)["math"]
    assert means["score"]["mean@1"] == 0.5
    assert means["reward_error"]["mean@1"] == 0.5
