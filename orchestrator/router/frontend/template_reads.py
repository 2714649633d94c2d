"""What a chat template reads, found in its syntax tree: in which form it wants contents and arguments, and which texts it looks for.

Owns the walk over the tree. It follows a value through ``set``, ``namespace`` attributes and arguments of macros; it renders nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
from jinja2 import nodes

#: Methods of a string that look for another string in it.
_SEARCHES = frozenset((
    "split", "rsplit", "partition", "rpartition", "startswith", "endswith", "find", "rfind", "index", "rindex", "count", "replace",
    "removeprefix", "removesuffix", "strip", "lstrip", "rstrip",
))  # fmt: skip
_PART_FILTERS = frozenset(("selectattr", "rejectattr", "map", "groupby"))
_SHAPE_TESTS = frozenset(("string", "mapping", "sequence", "iterable"))
_OBJECT_FILTERS = frozenset(("tojson", "items", "dictsort", "list"))


class TemplateReads(msgspec.Struct, frozen=True, kw_only=True):
    """``tools``: it lists the tools; ``tool_calls``: it writes earlier calls. ``parts``: it reads a content as a list of parts;
    ``shape``: it asks whether a content is a string or a list; ``null``: it asks whether a content is none. ``arguments_as_text``: it
    reads the arguments of a call as text. ``developer``: it knows this role. ``reasoning_effort``: it reads this variable. ``searched``:
    the texts that it looks for in others."""

    tools: bool
    tool_calls: bool
    parts: bool
    shape: bool
    null: bool
    arguments_as_text: bool
    developer: bool
    reasoning_effort: bool
    searched: tuple[str, ...]


def what_it_reads(tree: nodes.Template, tokens: Mapping[str, str]) -> TemplateReads:
    """``tokens``: the variables that hold texts of special tokens (``eos_token``)."""
    content, arguments = _Value(tree, "content"), _Value(tree, "arguments")
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    keys = {node.attr for node in tree.find_all(nodes.Getattr)}
    names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
    return TemplateReads(
        tools="tools" in names,
        tool_calls="tool_calls" in texts | keys,
        parts=_read_as_parts(tree, content),
        shape=any(node.name in _SHAPE_TESTS and content.is_in(node.node) for node in tree.find_all(nodes.Test)),
        null=_compared_with_none(tree, content),
        arguments_as_text=_read_as_text(tree, arguments) and not _read_as_object(tree, arguments),
        developer="developer" in texts,
        reasoning_effort="reasoning_effort" in names,
        searched=tuple(sorted(_searched(tree, tokens))),
    )


class _Value:
    """The value of one key (``message.content``), and all names that the template gives to it."""

    def __init__(self, tree: nodes.Template, key: str) -> None:
        self._keys, self._names = {key}, set[str]()
        known = 0
        while known != (known := len(self._keys) + len(self._names)):
            for target, value in _assignments(tree):
                if self.is_in(value):
                    (self._keys if isinstance(target, nodes.NSRef) else self._names).add(_target_name(target))

    def is_in(self, node: nodes.Node | None) -> bool:
        """Whether ``node`` may be this value, filtered or not."""
        match node:
            case nodes.Name():
                return node.name in self._names
            case nodes.Getattr():
                return node.attr in self._keys
            case nodes.Getitem(arg=nodes.Const(value=key)):
                return key in self._keys
            case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value=key), *_]):
                return key in self._keys
            case nodes.Filter():
                return node.name != "length" and self.is_in(node.node)
            case nodes.CondExpr():
                return self.is_in(node.expr1) or self.is_in(node.expr2)
            case nodes.BinExpr(operator="or" | "and"):
                return self.is_in(node.left) or self.is_in(node.right)
        return False


def _assignments(tree: nodes.Template) -> Iterator[tuple[nodes.Name | nodes.NSRef, nodes.Node]]:
    """(target, value) of every ``set``, and of every argument of a macro with the macro's parameter."""
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name | nodes.NSRef):
            yield node.target, node.node
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if not isinstance(call.node, nodes.Name):
            continue
        if call.node.name == "namespace":
            yield from ((nodes.NSRef("", pair.key), pair.value) for pair in call.kwargs)
        elif call.node.name in macros:
            parameters = macros[call.node.name].args
            yield from zip(parameters, call.args, strict=False)
            yield from ((nodes.Name(pair.key, "param"), pair.value) for pair in call.kwargs)


def _target_name(target: nodes.Name | nodes.NSRef) -> str:
    return target.attr if isinstance(target, nodes.NSRef) else target.name


def _subscripted(tree: nodes.Template) -> Iterator[nodes.Node]:
    """Everything that the template takes an attribute or an item of."""
    yield from (node.node for node in tree.find_all(nodes.Getattr))
    yield from (node.node for node in tree.find_all(nodes.Getitem))


def _read_as_parts(tree: nodes.Template, content: _Value) -> bool:
    if any(content.is_in(node.iter) for node in tree.find_all(nodes.For)):
        return True
    if any(node.name in _PART_FILTERS and content.is_in(node.node) for node in tree.find_all(nodes.Filter)):
        return True
    # content[0]['text'], (content | first).text, set part = content[0]
    return any(_item_of(content, node) for node in (*_subscripted(tree), *(value for _, value in _assignments(tree))))


def _item_of(content: _Value, node: nodes.Node) -> bool:
    match node:
        case nodes.Getitem(arg=nodes.Const(value=int())):
            return content.is_in(node.node)
        case nodes.Filter(name="first" | "last"):
            return content.is_in(node.node)
    return False


def _compared_with_none(tree: nodes.Template, content: _Value) -> bool:
    if any(node.name == "none" and content.is_in(node.node) for node in tree.find_all(nodes.Test)):
        return True
    for node in tree.find_all(nodes.Compare):
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if any(isinstance(side, nodes.Const) and side.value is None for side in sides) and any(map(content.is_in, sides)):
            return True
    return False


def _read_as_text(tree: nodes.Template, value: _Value) -> bool:
    if any(value.is_in(node.left) or value.is_in(node.right) for node in tree.find_all(nodes.Add)):
        return True
    written = [*(node.nodes for node in tree.find_all(nodes.Output)), *(node.nodes for node in tree.find_all(nodes.Concat))]
    return any(value.is_in(part) for parts in written for part in parts)


def _read_as_object(tree: nodes.Template, value: _Value) -> bool:
    return (
        any(node.name in _OBJECT_FILTERS and value.is_in(node.node) for node in tree.find_all(nodes.Filter))
        or any(node.name in _SHAPE_TESTS and value.is_in(node.node) for node in tree.find_all(nodes.Test))
        or any(value.is_in(node.iter) for node in tree.find_all(nodes.For))
        or any(value.is_in(node) for node in _subscripted(tree))
    )


def _searched(tree: nodes.Template, tokens: Mapping[str, str]) -> set[str]:
    bound: dict[str, set[str]] = {name: {text} for name, text in tokens.items()}
    known = -1
    while known != (known := sum(map(len, bound.values()))):
        for target, value in (*_assignments(tree), *_elements(tree)):
            if isinstance(value, nodes.Const | nodes.List | nodes.Tuple | nodes.Name | nodes.Getattr):
                bound.setdefault(_target_name(target), set()).update(_texts(value, bound))
    return {text for place in _places_of_searches(tree) for text in _texts(place, bound)}


def _elements(tree: nodes.Template) -> Iterator[tuple[nodes.Name, nodes.Node]]:
    """(variable, what it runs over) of every loop."""
    return ((node.target, node.iter) for node in tree.find_all(nodes.For) if isinstance(node.target, nodes.Name))


def _texts(expression: nodes.Node, bound: Mapping[str, set[str]]) -> Iterator[str]:
    """The texts in an expression. ``bound``: those of variables and attributes."""
    for node in (expression, *expression.find_all((nodes.Const, nodes.Name, nodes.Getattr))):
        match node:
            case nodes.Const(value=str(text)):
                yield text
            case nodes.Name():
                yield from list(bound.get(node.name, ()))
            case nodes.Getattr():
                yield from list(bound.get(node.attr, ()))


def _places_of_searches(tree: nodes.Template) -> Iterator[nodes.Node]:
    """The expressions in which a text stands that the template compares others with."""
    for compare in tree.find_all(nodes.Compare):
        yield compare.expr
        yield from (operand.expr for operand in compare.ops)
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEARCHES:
            yield from call.args
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        yield from node.args
