"""Strict YAML: a safe subset of YAML 1.2 with the line of every key.

Numbers may be written 1e-4; only `true` and `false` are booleans; a duplicate key, a tag, a flood of aliases or more
than 1 MB is refused (PyYAML alone reads `1e-4` as text, `no` as false, and lets the last duplicate win).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from danlu.errors import ConfigError, SecurityError
from danlu.words import _

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
Key = tuple[str | int, ...]
Lines = dict[Key, int]

_CORE = {
    "tag:yaml.org,2002:null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "tag:yaml.org,2002:int": (r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"^[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the scalars of YAML 1.2's core schema and nothing else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _Loader.add_implicit_resolver(_tag, re.compile(_CORE[_tag][0]), _CORE[_tag][1])


def parse(text: str, *, name: str = "<text>") -> tuple[Any, Lines]:
    """Return the value of one YAML document and the 1-based line of every key in it.

    Raises ConfigError for malformed YAML or duplicate keys, SecurityError for tags and alias bombs.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise SecurityError(_("the file is larger than {n} bytes").format(n=MAX_BYTES), where=name)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(
            _("this is not valid YAML: {why}").format(why=getattr(error, "problem", None) or error), where=where
        ) from None
    finally:
        loader.dispose()
    lines: Lines = {}
    return (_Reader(name, lines).value(node, ()) if node is not None else {}), lines


def scalar(text: str) -> Any:
    """Return what the right-hand side of an override means: `3e-4`, `true`, `[1, 2]`, `{a: 1}` or text."""
    try:
        return parse(text, name=text)[0] if text else ""
    except ConfigError:
        return text


def read(path: Path) -> tuple[Any, Lines]:
    """Return the content of the YAML file at `path` and its lines."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(_("the file cannot be read: {why}").format(why=error.strerror), where=str(path)) from None
    try:
        return parse(data.decode("utf-8-sig"), name=str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            _("the file is not UTF-8: byte {n}").format(n=error.start),
            where=str(path), fix=_("save it as UTF-8"),
        ) from None


class _Reader:
    """Turns nodes into values; counts them, so that aliases cannot multiply without end."""

    def __init__(self, name: str, lines: Lines) -> None:
        self.name, self.lines, self.seen = name, lines, 0
        self.open: set[int] = set()

    def value(self, node: yaml.Node, key: Key) -> Any:
        self.seen += 1
        where = f"{self.name}:{node.start_mark.line + 1}"
        if self.seen > MAX_NODES or id(node) in self.open:
            raise SecurityError(_("the aliases of this file expand without end"), where=where)
        self.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, where)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode) and node.tag.endswith(",2002:seq"):
                return [self.value(child, (*key, i)) for i, child in enumerate(node.value)]
            if isinstance(node, yaml.MappingNode) and node.tag.endswith(",2002:map"):
                return self.mapping(node, key)
        finally:
            self.open.discard(id(node))
        raise SecurityError(_("the tag {tag} is refused").format(tag=node.tag), where=where)

    def mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name_node, child in node.value:
            name, line = str(name_node.value), name_node.start_mark.line + 1
            where = f"{self.name}:{line}"
            if not isinstance(name_node, yaml.ScalarNode) or name == "<<":
                raise ConfigError(_("a key must be plain text"), where=where)
            if name in result:
                raise ConfigError(_("the key {key!r} stands twice").format(key=name), where=where)
            self.lines[(*key, name)] = line
            result[name] = self.value(child, (*key, name))
        return result

    def scalar(self, node: yaml.ScalarNode, where: str) -> Any:
        text, tag = node.value, node.tag
        if tag == "tag:yaml.org,2002:str":
            return text
        if tag == "tag:yaml.org,2002:null":
            return None
        if tag == "tag:yaml.org,2002:bool":
            return text.lower() == "true"
        if tag == "tag:yaml.org,2002:int":
            return int(text.replace("_", ""), 16 if "x" in text else 10)
        if tag == "tag:yaml.org,2002:float":
            return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        raise SecurityError(_("the tag {tag} is refused").format(tag=tag), where=where)
