"""``model.attention: auto`` takes flash attention where it can be had, and says what it costs where it cannot."""

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch

from ptl_rl import attention
from ptl_rl.attention import resolve_attention
from ptl_rl.checkpoints.sharded import load_sharded
from ptl_rl.config import ConfigError
from ptl_rl.families import UnsupportedModelError
from ptl_rl.recovery.cpt import _parent_loss

LLAMA = {"model_type": "llama"}
GEMMA2 = {"model_type": "gemma2", "attn_logit_softcapping": 50.0}


@pytest.fixture
def flash_attn(monkeypatch):
    """A package flash-attn of a version that is set."""

    def install(version: str, error: str | None = None) -> None:
        module = types.ModuleType("flash_attn")
        module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", loader=Broken(error) if error else None)
        monkeypatch.setattr(attention, "find_spec", lambda name: module.__spec__)
        monkeypatch.setattr(attention, "version", lambda name: version)
        if error:
            monkeypatch.setattr(sys, "meta_path", [Broken(error), *sys.meta_path])
        else:
            monkeypatch.setitem(sys.modules, "flash_attn", module)

    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    return install


class Broken:
    """Stands in for a wheel whose extension does not load."""

    def __init__(self, error: str) -> None:
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "flash_attn":
            raise ImportError(self.error)
        return None


def test_flash_attention_where_it_can_be_had(flash_attn):
    flash_attn("2.8.3")
    for config in (LLAMA, GEMMA2):
        for setting in ("auto", "flash_attention_2"):
            found = resolve_attention(setting, "cuda", "bfloat16", config)
            assert (found.name, found.note) == ("flash_attention_2", None)


@pytest.mark.parametrize(("config", "plain"), [(LLAMA, "sdpa"), (GEMMA2, "eager"), ({"model_type": "gemma2"}, "eager")])
def test_padded_rows_elsewhere_and_what_they_cost(config, plain, flash_attn):
    found = resolve_attention("auto", "cuda", "bfloat16", config)
    assert found.name == plain
    assert found.note is not None
    assert f"model.attention is {plain}, as the package flash-attn is not installed" in found.note
    assert "padded to their longest sequence" in found.note and "install flash-attn" in found.note


def test_a_soft_cap_that_is_switched_off_needs_no_eager_attention(flash_attn):
    assert resolve_attention("auto", "cpu", "float32", {**GEMMA2, "attn_logit_softcapping": None}).name == "sdpa"


@pytest.mark.parametrize(
    ("version", "error", "reason"),
    [
        (None, None, "the package flash-attn is not installed"),
        ("2.5.8", None, r"flash-attn is 2\.5\.8, older than 2\.6\.3"),
        ("2.8.3", "undefined symbol: _ZN3c10", "cannot be imported, .*undefined symbol"),
    ],
)
def test_what_was_asked_for_by_name_is_refused_with_the_remedy(version, error, reason, flash_attn):
    if version:
        flash_attn(version, error)
    with pytest.raises(
        ConfigError, match=rf"model\.attention: flash_attention_2, but .*{reason}.*--no-build-isolation"
    ):
        resolve_attention("flash_attention_2", "cuda", "bfloat16", LLAMA)
    assert reason.split(",")[0].replace("\\", "") in (resolve_attention("auto", "cuda", "bfloat16", LLAMA).note or "")


def test_flash_attention_takes_a_gpu_and_16_bits(flash_attn):
    flash_attn("2.8.3")
    with pytest.raises(ConfigError, match=r"model\.attention: flash_attention_2 has no CPU build; set it to auto"):
        resolve_attention("flash_attention_2", "cpu", "bfloat16", LLAMA)
    with pytest.raises(ConfigError, match=r"computes in 16 bits only; set model\.dtype to bfloat16"):
        resolve_attention("flash_attention_2", "cuda", "float32", LLAMA)
    assert resolve_attention("auto", "cpu", "float32", LLAMA).name == "sdpa"
    assert resolve_attention("auto", "cuda", "float32", GEMMA2).name == "eager"


def test_flash_attention_is_not_taken_on_gpus_that_it_does_not_run_on(flash_attn):
    flash_attn("2.8.3")
    assert resolve_attention("auto", "cuda", "bfloat16", LLAMA, capability=8.0).name == "flash_attention_2"
    found = resolve_attention("auto", "cuda", "bfloat16", LLAMA, capability=7.5)
    assert found.name == "sdpa" and "compute capability 8.0, and here is 7.5" in (found.note or "")
    with pytest.raises(ConfigError, match=r"compute capability 8\.0, and here is 7\.5"):
        resolve_attention("flash_attention_2", "cuda", "bfloat16", LLAMA, capability=7.5)


def test_an_attention_that_leaves_out_the_soft_cap_is_refused(make_checkpoint):
    for device in ("cpu", "cuda"):
        for config in (GEMMA2, {"model_type": "gemma2"}):
            with pytest.raises(ConfigError, match=r"model\.attention: sdpa leaves out the soft cap .* set it to auto"):
                resolve_attention("sdpa", device, "bfloat16", config)
    assert resolve_attention("sdpa", "cpu", "float32", {**GEMMA2, "attn_logit_softcapping": None}).name == "sdpa"
    with pytest.raises(UnsupportedModelError, match="sdpa leaves out the soft cap"):
        load_sharded(make_checkpoint("gemma2"), None, torch.float32, attention="sdpa")


def test_a_parent_with_a_soft_cap_keeps_it_where_the_policy_has_none(make_checkpoint):
    recovery = types.SimpleNamespace(parent_kl=1.0, cross_entropy=1.0)
    for parent, policys, expected in (
        ("gemma2", "sdpa", "eager"),
        ("llama", "sdpa", "sdpa"),
        ("gemma2", "flash_attention_2", "flash_attention_2"),
    ):
        spec = types.SimpleNamespace(attention=policys, parent=make_checkpoint(parent))
        config = types.SimpleNamespace(model=types.SimpleNamespace(dtype="float32"))
        assert _parent_loss(types.SimpleNamespace(spec=spec, config=config), recovery).attention == expected


def test_what_is_named_is_taken(flash_attn):
    assert resolve_attention("eager", "cuda", "bfloat16", LLAMA).name == "eager"


def test_a_machine_without_the_package_is_asked_for_real():
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed here")
    assert attention.flash_problem() == "the package flash-attn is not installed"
