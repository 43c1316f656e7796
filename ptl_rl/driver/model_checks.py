"""Checks before a run that need transformers, in a process of their own.

Importing transformers takes seconds and much memory, and the driver needs none of it. So a child imports it and looks
at the model's files while the driver reads the rows; then it counts the tokens of their prompts.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.data.records import Progress
from ptl_rl.errors import UserError
from ptl_rl.families import read_config_json
from ptl_rl.verl_patches.quick_imports import leave_out_scipy

_AT_ONCE = 4096
_USUAL_DTYPES = ("float32", "bfloat16", "float16")


class ModelChecks:
    """The child; it ends with the ``with`` block."""

    def __init__(self, config: RunConfig, model: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ptl_rl.driver.model_checks", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Without TRANSFORMERS_NO_ADVISORY_WARNINGS transformers says where it has no torch.
            env={**os.environ, "PYTHONSAFEPATH": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
            start_new_session=True,  # a Ctrl-C reaches the driver only
        )
        self._send(config.model_dump(mode="json"))

    def __enter__(self) -> "ModelChecks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def watched(self, progress: Progress) -> Progress:
        """``progress`` that raises as :meth:`notes` does as soon as the child has refused the model."""

        def watching(what: str, done: int, total: int) -> None:
            if self.process.poll() is not None:
                self.notes()
            progress(what, done, total)

        return watching

    def notes(self) -> list[str]:
        """Wait for the verdict on the model's files, which is given once; returns notes on them.

        Raises:
            ConfigError: what :func:`~ptl_rl.driver.prompt_checks.check_tokenizer` refuses.
            RuntimeError: the child failed; what it said stands above.
        """
        kind, content = self._answer()
        if kind == "refused":
            raise ConfigError(content)
        found: list[str] = content
        return found

    def prompt_tokens(self, questions: Iterable[str]) -> list[int]:
        """How many tokens each question's prompt has, in the chat template; after :meth:`notes`."""
        left, lengths = iter(questions), list[int]()
        while some := list(itertools.islice(left, _AT_ONCE)):
            self._send(some)
            lengths += self._answer()
        return lengths

    def _send(self, message: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # its answer says why, or that there is none

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise RuntimeError(f"checking the model ended with status {self.process.wait()}; the error stands above")


def does_without_torch(config: RunConfig, model: Path) -> bool:
    """Whether the checks find the same without torch, whose import takes most of their seconds.

    A model's own code may import it. transformers looks a configuration's dtype up in it, and takes any text without
    it: so it is left out only where the dtype is one of the usual.
    """
    values = read_config_json(model)
    dtypes = (values.get("torch_dtype"), values.get("dtype"))
    return not config.model.trust_remote_code and all(dtype in (None, *_USUAL_DTYPES) for dtype in dtypes)


def main(model: Path) -> None:
    """Read a configuration; write the verdict; then read lists of questions, and write their prompts' lengths."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    from ptl_rl.config.recipe import parse_config
    from ptl_rl.data.prompts import prompt_ids
    from ptl_rl.driver.prompt_checks import check_tokenizer

    config = parse_config(json.loads(sys.stdin.readline()))
    leave_out_scipy()
    try:
        if does_without_torch(config, model):
            sys.modules["torch"] = None  # type: ignore[assignment]
        tokenizer, notes = check_tokenizer(config, model)
    except UserError as error:
        answer(["refused", str(error)])
        return
    answer(["notes", notes])
    for line in sys.stdin:
        answer([len(prompt_ids(tokenizer, question)) for question in json.loads(line)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
