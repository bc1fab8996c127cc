"""A loader of plain YAML: one level of `option: value`.

Without expansion, and without duplicate options. Only scalars that YAML 1.1 and 1.2 parse equally are converted. All
others stay text: `010`, `1:30`, `1_000`, `1e-3` and `yes` keep their characters, and the type of the option decides how
they are read.
"""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError


class PlainLoader(yaml.SafeLoader):
    """YAML loader that accepts only scalars and lists, by unique keys.

    Rejects anchors, aliases, merge keys, tags and nested collections.
    """

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  # declared so by the base class

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose the next node, or reject it before its content is read."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        problem = ""
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            problem = "anchors and aliases are not allowed"
        elif event.tag is not None:
            problem = "tags are not allowed"
        elif isinstance(event, yaml.CollectionStartEvent) and parent is not None:
            is_list = isinstance(event, yaml.SequenceStartEvent) and isinstance(parent, yaml.MappingNode)
            problem = "" if is_list else "expected a value or a list of values"
        if problem:
            raise ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a dictionary; duplicate keys are an error."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(None, None, f"duplicate option {key.value}", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?", "-+.0123456789"),
):
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), [*_first])
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])
