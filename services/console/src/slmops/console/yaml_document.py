"""Reads YAML documents that people write."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice. PyYAML keeps the last value, so a person may read another value than we do."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def load(text: str) -> Any:
    """Parses YAML, or JSON as a subset of YAML. Raises `yaml.YAMLError`, also for a key that occurs twice."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a subclass of the safe loader
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
