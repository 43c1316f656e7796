"""YAML as people mean it: what the plain loader takes without a word, or cannot take, is refused with its line."""

from typing import Any

import yaml

from ptl_rl.config.section import ConfigError

DEEPEST = 32
"""Mappings and lists within one another; no recipe has more than ten."""
MOST_VALUES = 100_000
"""Once every alias is written out; a few lines of aliases to aliases come to billions."""
ODD_TAGS = (ValueError, KeyError, IndexError, AttributeError)
"""What the loader raises for ``!!int ""`` and the like; ValueError for impossible dates, too."""


def read_yaml_text(text: str, where: str) -> Any:
    """The value of one YAML document.

    Raises:
        ConfigError: begins with ``where``; no YAML, a key twice in one mapping, a value that is too deep or holds
            itself, half of a surrogate pair, or a number or date that Python cannot hold.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        loader.check(node, [], {})
        return loader.construct_document(node)
    except (yaml.YAMLError, *ODD_TAGS) as error:
        said = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise ConfigError(f"{where}: not valid YAML: {said}") from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As yaml's, but it stops where yaml would go on until Python's stack is full."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise _error("too many mappings and lists within one another", self.peek_event())
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def check(
        self, node: yaml.Node, within: list[yaml.Node], known: dict[yaml.Node, tuple[int, int]]
    ) -> tuple[int, int]:
        """How many values a node comes to, and how deep it is, with every alias written out.

        Args:
            within: the nodes that it stands in.
            known: what this gave for nodes that are checked.
        """
        if node in within:
            raise _error("a value that holds itself by an alias", node)
        if node not in known:
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                self._check_keys(node)
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            elif any("\ud800" <= character <= "\udfff" for character in node.value):
                node.value = _joined(node)
            found = [self.check(part, [*within, node], known) for part in parts]
            known[node] = 1 + sum(size for size, _ in found), 1 + max((depth for _, depth in found), default=0)
        size, depth = known[node]
        if size > MOST_VALUES or depth > DEEPEST:
            raise _error("aliases that come to too many values, or values too deep", node)
        return size, depth

    def _check_keys(self, node: yaml.MappingNode) -> None:
        """Of two equal keys yaml drops the first one's value; ``1`` and ``"1"`` are the same setting."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no mapping may have it, and the loader says so
            is_plain = key.tag not in ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
            name, line = str(self.construct_object(key) if is_plain else key.value), key.start_mark.line + 1
            if name in lines:
                raise _error(f"the key {name!r} twice in one mapping, first in line {lines[name]}; keep one", key)
            lines[name] = line


def _joined(node: yaml.Node) -> str:
    """JSON, which is YAML, writes one character beyond 16 bits as two escapes, and yaml leaves them two."""
    try:
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _error("half of a surrogate pair, which is no character", node) from None


def _error(what: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"it has {what}", problem_mark=at.start_mark)
