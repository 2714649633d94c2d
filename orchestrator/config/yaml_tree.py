"""Parses the text of a deployment file into a tree of mappings, lists and scalars. Owns the reading of YAML; knows no key of a
deployment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workers.protocol.errors import ConfigError

EXAMPLE = "deploy/examples/local.yaml is a whole one (trireme config examples writes it)"


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises :class:`ConfigError` with the line at fault."""
    import yaml  # imported here: most command lines read no file

    class Loader(yaml.SafeLoader):
        """A safe loader that refuses duplicate keys: without this, the second one would silently win."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

        def construct_number(self, node: yaml.ScalarNode) -> Any:
            if ":" in node.value:
                problem = f"YAML takes {node.value[:40]} for a number to the base 60"
                raise yaml.constructor.ConstructorError(None, None, f"{problem}: write seconds, or quote it", node.start_mark)
            whole = node.tag.endswith(":int")
            return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)

    for tag in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{tag}", Loader.construct_number)

    try:
        tree = yaml.load(path.read_bytes().decode(), Loader=Loader)  # noqa: S506 - derived from SafeLoader
    except OSError as error:
        raise ConfigError(f"cannot read {path}", error.strerror or str(error), f"name a deployment file; {EXAMPLE}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML", _place(error), f"fix it there (spaces indent, tabs do not); {EXAMPLE}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no mapping", "a deployment file is a YAML mapping with `models` in it", EXAMPLE)
    return tree


def _place(error: Exception) -> str:
    """The place and the problem, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())[:300]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def copy(value: Any) -> Any:
    """A mutable copy of a tree."""
    if isinstance(value, Mapping):
        return {key: copy(item) for key, item in value.items()}
    return [copy(item) for item in value] if isinstance(value, (list, tuple)) else value


def paths(tree: Any, path: str = "") -> Iterator[str]:
    """The paths of all values: ``models[0].dtype``."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from paths(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for index, value in enumerate(tree):
            yield from paths(value, f"{path}[{index}]")
    else:
        yield path
