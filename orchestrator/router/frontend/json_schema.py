"""A request's JSON schema, checked and brought to one form: every reference is ``#/$defs/NAME``, and every definition stands at the top.

In that form schemas of several tools fit into one (:meth:`Definitions.localize` for each), wherever they are nested. Owns the checks that
need no compiler: size, depth, references, patterns, and that every definition has a finite value. It never follows a reference out of the
schema, and never reads data (``default``, ``examples``, ``const``, ``enum``) as a schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

import msgspec

from orchestrator.router.frontend.pattern_size import PatternTooLarge, check_pattern
from workers.protocol.errors import Rejected

MAX_DEPTH = 64
MAX_NODES = 10_000
#: Nodes that the search for finite values may visit: many times what a schema of MAX_NODES needs, unless its recursion is contrived.
MAX_VISITS = 10 * MAX_NODES

#: Keywords that hold a schema or a list of schemas, and those that hold schemas by name. All others hold data.
_SCHEMAS = frozenset((
    "items", "prefixItems", "additionalItems", "unevaluatedItems", "contains", "additionalProperties", "unevaluatedProperties",
    "propertyNames", "anyOf", "oneOf", "allOf", "not", "if", "then", "else",
))  # fmt: skip
_NAMED_SCHEMAS = frozenset(("properties", "patternProperties", "dependentSchemas"))
_DEFINITIONS = ("$defs", "definitions")
#: Keywords that name a schema for references. They are left out: references no longer need them.
_NAMES = frozenset(("$id", "$anchor", "$schema", *_DEFINITIONS))
#: Keywords that restrict nothing.
_NOTES = frozenset(("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"))
#: The formats that JSON schema defines; others (`password`, ...) are notes by its rules. The compiler refuses those that it cannot follow.
_FORMATS = frozenset((
    "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri", "uri-reference",
    "iri", "iri-reference", "uuid", "uri-template", "json-pointer", "relative-json-pointer", "regex",
))  # fmt: skip
#: Keywords by which the compiler is told how to read the whole schema.
_DIRECTIVES = ("$schema", "x-guidance")
_CONTAINERS = frozenset(("object", "array"))
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)


def invalid(param: str, why: str) -> Rejected:
    return Rejected(f"{param}: {why}", code="invalid_schema", param=param)


class Definitions:
    """The definitions that the schemas of one request use. ``closed``: objects take no properties but those that they name, unless they
    say so themselves (vLLM's ``disable_additional_properties``)."""

    def __init__(self, param: str, *, closed: bool = False) -> None:
        self._param, self._closed = param, closed
        self._schemas: dict[str, Any] = {}
        self._names: set[str] = set()
        self._nodes = 0

    def localize(self, schema: dict[str, Any]) -> dict[str, Any]:
        """``schema`` with references to these definitions, which grow by those that it uses. Raises Rejected (``invalid_schema``)."""
        document = _Document(schema, self._param)
        found = self._rewrite(schema, document.base, document, 0)
        for target in document.targets:  # which grow meanwhile
            self._schemas[target.name] = self._rewrite(target.node, target.base, document, 0)
        if (name := document.name_of(schema)) is not None:
            return {"$ref": _pointer(name)}
        assert isinstance(found, dict)
        return found

    def complete(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A localized ``schema``, or one that contains some, with its definitions. Raises Rejected where one has no finite value."""
        if not self._schemas:
            return schema
        self._check_finite()
        return {**schema, "$defs": self._schemas}

    def _rewrite(self, node: Any, base: str, document: _Document, depth: int) -> Any:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise invalid(self._param, f"the schema is deeper than {MAX_DEPTH} levels or has more than {MAX_NODES} parts")
        if isinstance(node, list):
            return [self._rewrite(item, base, document, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        base = document.bases.get(id(node), base)
        if isinstance(pattern := node.get("pattern"), str):
            self._check_pattern(pattern)
        found: dict[str, Any] = {}
        for key, value in node.items():
            if key == "$ref":
                found[key] = _pointer(self._resolve(value, base, document))
            elif key in _SCHEMAS:
                found[key] = self._rewrite(value, base, document, depth + 1)
            elif key in _NAMED_SCHEMAS and isinstance(value, dict):
                if key == "patternProperties":
                    for pattern in value:
                        self._check_pattern(pattern)
                found[key] = {name: self._rewrite(item, base, document, depth + 1) for name, item in value.items()}
            elif key in ("$dynamicRef", "$recursiveRef"):
                raise invalid(self._param, f"{key} is not followed; use $ref")
            elif key not in _NAMES and not (key == "format" and isinstance(value, str) and value not in _FORMATS):
                found[key] = value
        if "$ref" in found and found.keys() - {"$ref"} <= _NOTES:
            # A recursive reference must stand alone for the compiler.
            return {"$ref": found["$ref"]}
        if self._closed and found.keys() & {"properties", "patternProperties"}:
            found.setdefault("additionalProperties", False)
        return found

    def _check_pattern(self, pattern: str) -> None:
        try:
            check_pattern(pattern)
        except PatternTooLarge as error:
            raise invalid(self._param, str(error)) from None

    def _resolve(self, reference: Any, base: str, document: _Document) -> str:
        """The name of the definition that a reference means; a new one has a plain name that tells where it comes from."""
        if not isinstance(reference, str):
            raise invalid(self._param, "$ref must be a string")
        node, uri = document.resolve(reference, base)
        if (name := document.name_of(node)) is not None:
            return name
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", unquote(reference).rpartition("/")[2]).strip("_") or "root"
        name, number = plain, 2
        while name in self._names:
            name, number = f"{plain}_{number}", number + 1
        self._names.add(name)
        document.add_target(_Target(name=name, node=node, base=uri))
        return name

    def _check_finite(self) -> None:
        """Every definition must have a finite value, or the output would never end. Found bottom up, as the least set that holds every
        definition with a value made of definitions in the set."""
        search = _FiniteValues(self._param)
        waiting = list(reversed(self._schemas))
        while waiting:
            left = [name for name in waiting if not search.add(name, self._schemas[name])]
            if len(left) == len(waiting):
                raise invalid(self._param, f"the reference {left[0][:64]!r} is recursive without an end: no finite value fits it")
            waiting = left


def directives(schema: dict[str, Any]) -> dict[str, Any]:
    """What a schema tells the compiler about itself."""
    return {key: schema[key] for key in _DIRECTIVES if key in schema}


class _Target(msgspec.Struct, frozen=True, kw_only=True):
    """A node that references lead to, the URI that its own references start from, and its name as a definition."""

    name: str
    node: dict[str, Any] | bool
    base: str


class _Document:
    """One schema with its own references. ``base``: its URI; ``bases``: URIs of the parts that have one of their own, by the identity of
    the node; ``targets``: where its references led to."""

    def __init__(self, schema: dict[str, Any], param: str) -> None:
        self._param = param
        self.bases: dict[int, str] = {}
        self.targets: list[_Target] = []
        self._names: dict[int, str] = {}
        self._anchors: dict[str, tuple[Any, str]] = {}
        self.base = _uri(schema, "")
        self._resources: dict[str, Any] = {self.base: schema}
        self._index(schema)

    def _index(self, schema: dict[str, Any]) -> None:
        left = [(schema, "")]
        visited = 0
        while left:
            node, base = left.pop()
            visited += 1
            if visited > MAX_NODES:
                raise invalid(self._param, f"the schema has more than {MAX_NODES} parts")
            if own := _uri(node, base):
                base = self.bases[id(node)] = own
                self._resources.setdefault(base, node)
            if isinstance(anchor := node.get("$anchor"), str):
                self._anchors[f"{base}#{anchor}"] = (node, base)
            left += [(child, base) for child in _children(node)]

    def name_of(self, node: Any) -> str | None:
        return self._names.get(id(node))

    def add_target(self, target: _Target) -> None:
        self._names[id(target.node)] = target.name
        self.targets.append(target)

    def resolve(self, reference: str, base: str) -> tuple[dict[str, Any] | bool, str]:
        """The node that a reference means, and the URI that its own references start from. Raises Rejected."""
        shown = repr(reference[:64])
        uri, fragment = (base, reference[1:]) if reference.startswith("#") else urldefrag(_join(base, reference))
        if uri not in self._resources:
            raise invalid(self._param, "references out of the schema are not followed")
        found = self._anchors.get(f"{uri}#{fragment}") or self._point(self._resources[uri], unquote(fragment), uri)
        if found is None:
            raise invalid(self._param, f"the reference {shown} leads nowhere")
        if not isinstance(found[0], dict | bool):
            raise invalid(self._param, f"the reference {shown} leads to no schema")
        return found

    def _point(self, node: Any, pointer: str, base: str) -> tuple[Any, str] | None:
        """The node at a JSON pointer (RFC 6901), and the URI that its references start from; None = there is none."""
        first, *parts = pointer.split("/")
        if first:
            return None
        for part in parts:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and _INDEX.fullmatch(key) and int(key) < len(node):
                node = node[int(key)]
            else:
                return None
            base = self.bases.get(id(node), base)
        return node, base


def _uri(node: dict[str, Any], base: str) -> str:
    """The URI that a node gives itself; empty where it gives none."""
    own = node.get("$id")
    return urldefrag(_join(base, own))[0] if isinstance(own, str) and not own.startswith("#") else ""


def _join(base: str, reference: str) -> str:
    try:
        return urljoin(base, reference)
    except ValueError:
        return reference  # no URI; it leads out of the schema


def _children(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in node.items():
        if key in _SCHEMAS:
            found = value if isinstance(value, list) else [value]
        elif (key in _NAMED_SCHEMAS or key in _DEFINITIONS) and isinstance(value, dict):
            found = list(value.values())
        else:
            continue
        yield from (item for item in found if isinstance(item, dict))


def _pointer(name: str) -> str:
    return f"#/$defs/{name}"


class _FiniteValues:
    """Which definitions have a finite value, as far as is known."""

    def __init__(self, param: str) -> None:
        self._param = param
        self._known: set[str] = set()
        self._visits = 0

    def add(self, name: str, schema: Any) -> bool:
        if finite := self._finite(schema):
            self._known.add(name)
        return finite

    def _finite(self, node: Any) -> bool:
        self._visits += 1
        if self._visits > MAX_VISITS:
            raise invalid(self._param, "the schema's recursion is too entangled")
        if not isinstance(node, dict):
            return True
        if "const" in node or "enum" in node:
            return True
        if "$ref" in node and node["$ref"].removeprefix(_pointer("")) not in self._known:
            return False
        for key in ("anyOf", "oneOf"):
            if isinstance(options := node.get(key), list) and not any(map(self._finite, options)):
                return False
        if isinstance(parts := node.get("allOf"), list) and not all(map(self._finite, parts)):
            return False
        types = node.get("type")
        kinds = (
            {types} if isinstance(types, str) else {kind for kind in types if isinstance(kind, str)} if isinstance(types, list) else set()
        )
        if not kinds or not kinds <= _CONTAINERS:
            return True
        return ("object" in kinds and self._finite_object(node)) or ("array" in kinds and self._finite_array(node))

    def _finite_object(self, node: dict[str, Any]) -> bool:
        properties = _mapping(node.get("properties"))
        others = node.get("additionalProperties", True)
        required = node.get("required")
        for name in required if isinstance(required, list) else ():
            if isinstance(name, str) and not self._finite(properties.get(name, others)):
                return False
        fewest = _count(node.get("minProperties"))
        if not fewest or self._finite(others):
            return True
        free = [*properties.values(), *_mapping(node.get("patternProperties")).values()]
        return sum(map(self._finite, free)) >= fewest or any(map(self._finite, _mapping(node.get("patternProperties")).values()))

    def _finite_array(self, node: dict[str, Any]) -> bool:
        fewest = _count(node.get("minItems"))
        first, others = node.get("prefixItems"), node.get("items", True)
        if isinstance(others, list):
            first, others = others, node.get("additionalItems", True)
        first = first if isinstance(first, list) else []
        return all(map(self._finite, first[:fewest])) and (fewest <= len(first) or self._finite(others))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
