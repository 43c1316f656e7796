"""Shared fixtures: small checkpoints of every family, and recipes."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # As the driver sets it for its stages: a torch that was built for CUDA is no proof of a machine without it.
    os.environ.setdefault("VERL_PLATFORM", "cpu")

# How long an example takes says more of what else the machine does.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory) -> Iterator[Path]:
    """Prepared data goes to a folder of the tests, also in the processes that they start."""
    folder = tmp_path_factory.mktemp("data-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTL_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def heap_of_earlier_modules() -> None:
    """The objects of what is imported are for good: a collection that walks them, too, takes most of a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries complain of objects that outlive the interpreter


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """A command that a test calls in this process installs handlers; they end with the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def tokenizer():
    from ptl_rl.testbed.tokenizer import build_tokenizer

    return build_tokenizer(sample_problems=300, vocab_size=300)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, tokenizer):
    """Factory: a saved tiny checkpoint of a family, with tokenizer; overrides go to its config."""
    from ptl_rl.testbed.tiny_models import tiny_model

    def make(family: str, seed: int = 0, max_shard_size: str = "5GB", **overrides) -> Path:
        sizes = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        sizes |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        folder = tmp_path_factory.mktemp(family)
        model = tiny_model(family, seed=seed, **{**sizes, **overrides})
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        return folder

    return make
