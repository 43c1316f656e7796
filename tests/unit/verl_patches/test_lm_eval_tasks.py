"""Definitions of lm-eval load here; each patch has a test that fails when upstream makes it needless."""

import importlib.metadata
import sys

import pytest

from ptl_rl.errors import UserError
from ptl_rl.verl_patches import lm_eval_tasks

MINERVA, MBPP = "minerva_math/minerva_math_algebra.yaml", "mbpp/mbpp.yaml"


@pytest.fixture
def fresh_modules(monkeypatch):
    """lm-eval keeps the modules of tasks; without them they are imported anew."""
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.m")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def load_plainly(path):
    from pathlib import Path

    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(Path(lm_eval.tasks.__file__).parent / path)


@pytest.mark.canary
def test_minerva_math_is_still_refused_beside_the_antlr_that_omegaconf_needs(fresh_modules):
    assert not importlib.metadata.version(lm_eval_tasks.ANTLR).startswith("4.11")
    with pytest.raises(AssertionError, match=r"4\.11"):
        load_plainly(MINERVA)


def test_minerva_math_loads_and_the_version_is_true_again(fresh_modules):
    definition = lm_eval_tasks.task_definition(MINERVA)
    assert len(definition["fewshot_config"]["samples"]()) == definition["num_fewshot"] == 4
    assert not importlib.metadata.version(lm_eval_tasks.ANTLR).startswith("4.11")


@pytest.mark.canary
def test_mbpp_still_asks_the_hub_for_a_metric_when_it_is_imported(fresh_modules, monkeypatch):
    import evaluate

    asked = []

    def load(name, *_, **__):
        asked.append(name)
        raise ConnectionError(name)

    monkeypatch.setattr(evaluate, "load", load)
    with pytest.raises(ConnectionError):
        load_plainly(MBPP)
    assert asked == ["code_eval"]


def test_mbpp_loads_without_it_and_the_loader_is_true_again(fresh_modules):
    import evaluate

    loader = evaluate.load
    definition = lm_eval_tasks.task_definition(MBPP)
    assert [example["task_id"] for example in definition["fewshot_config"]["samples"]()] == [2, 3, 4]
    assert evaluate.load is loader


def test_other_versions_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.0")
    with pytest.raises(UserError, match=r"supports lm-eval .* found 0\.5\.0"):
        lm_eval_tasks.task_definition(MINERVA)
