"""Whether a chat template costs no more than a few readings of what it is given, found in its syntax tree.

Owns that judgement alone. A template of which it holds is rendered in the router's own process while the request is small; every other
one, and every larger request, goes to a sandbox process, which can be killed. The judgement errs on that side: what is not known here is
not bounded.

A bounded template has no macros, no ``range`` and no other call of unknown cost. A loop runs over the messages, the tools or the documents,
a loop within it over a part of the outer loop's element, and what is read whole in it is a part of the inner loop's. No variable can double
from turn to turn. So the work is linear in the size of the request, but for a text that is put together in a loop and read there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from jinja2 import nodes

_N = TypeVar("_N", bound=nodes.Node)

#: Longest text of a template that is judged, characters.
MAX_SOURCE = 32 << 10
#: Loops within each other; the largest number, and the longest text or list, as an argument or for a loop.
_MAX_DEPTH, _MAX_NUMBER, _MAX_TEXT = 3, 8, 64

_KNOWN = frozenset((
    nodes.Template, nodes.Output, nodes.If, nodes.Assign, nodes.Scope, nodes.Break, nodes.Continue, nodes.ExprStmt,
    nodes.Name, nodes.NSRef, nodes.Const, nodes.TemplateData, nodes.Getitem, nodes.Slice, nodes.Test, nodes.Compare, nodes.Operand,
    nodes.And, nodes.Or, nodes.Not, nodes.Add, nodes.Sub, nodes.Concat, nodes.CondExpr, nodes.Pair, nodes.Keyword, nodes.Neg,
))  # fmt: skip
#: What makes nothing larger of a value, and what reads it once and may make it larger.
_KEEPING = frozenset((
    "trim", "first", "last", "length", "count", "default", "d", "strip", "lstrip", "rstrip", "split", "rsplit", "partition", "rpartition",
    "startswith", "endswith", "find", "rfind", "index", "get", "items", "keys", "values", "removeprefix", "removesuffix",
))  # fmt: skip
_READING = frozenset(("tojson", "string", "list", "join", "lower", "upper", "capitalize", "title", "replace"))
_FUNCTIONS = frozenset(("raise_exception", "namespace", "strftime_now"))
#: They look at one element, or at none.
_AT_ONCE = frozenset(("first", "last", "length", "count", "default", "d", "get", "startswith", "endswith"))
#: They may return their argument.
_WITH_DEFAULT = frozenset(("default", "d", "get"))


def is_bounded(tree: nodes.Template) -> bool:
    """Whether the cost of the template of this tree is bounded as the module says."""
    return _Judge(tree).bounded


class _Judge:
    def __init__(self, tree: nodes.Template) -> None:
        #: Every ``set`` with the loops around it, the innermost one last.
        self._assignments: list[tuple[nodes.Assign, tuple[nodes.For, ...]]] = list(_assignments(tree, ()))
        self._assigned = {name for assign, _ in self._assignments for name in _targets(assign.target)} | {
            pair.key for call in tree.find_all(nodes.Call) for pair in call.kwargs
        }
        self._moving = {name for assign, loops in self._assignments if loops for name in _targets(assign.target)}
        self._set_in = {(name, id(loops[-1])) for assign, loops in self._assignments if loops for name in _targets(assign.target)}
        self._parts = self._find_parts()
        self.bounded = (
            all(self._is_known(node) for node in (tree, *tree.find_all(nodes.Node)))
            and all(self._grown(assign.node) <= 1 for assign, _ in self._assignments)
            and all(self._statement_is_bounded(node, ()) for node in tree.body)
        )

    def _find_parts(self) -> set[tuple[str, int]]:
        """(name, id of a loop): variables that are set in that loop to parts of its element or to constants alone, and not around it."""
        parts = set(self._set_in)
        for assign, loops in self._assignments:
            for name in _targets(assign.target):
                if isinstance(assign.target, nodes.NSRef) or not loops:
                    parts = {one for one in parts if one[0] != name}
                else:
                    parts -= {(name, id(inner)) for inner in loops[-1].find_all(nodes.For)}
        known = -1
        while known != len(parts):
            known = len(parts)
            for assign, loops in self._assignments:
                if loops and not self._is_part(assign.node, loops[-1], parts):
                    parts -= {(name, id(loops[-1])) for name in _targets(assign.target)}
        return parts

    def _is_part(self, value: nodes.Node | None, loop: nodes.For, parts: set[tuple[str, int]]) -> bool:
        """Whether ``value`` is a part of the element of ``loop``, or a constant, or either."""
        match value:
            case None:
                return True
            case nodes.Const(value=constant):
                return not isinstance(constant, str) or len(constant) <= _MAX_TEXT
            case nodes.Name(name=name):
                own = (name, id(loop))
                return own in parts or (own not in self._set_in and name in _targets(loop.target))
            case nodes.Getattr(node=whole) | nodes.Getitem(node=whole):
                return self._is_part(whole, loop, parts)
            case (
                nodes.Filter(name=name, node=whole, args=arguments) | nodes.Call(node=nodes.Getattr(node=whole, attr=name), args=arguments)
            ):
                return name in _KEEPING and all(self._is_part(part, loop, parts) for part in (whole, *arguments))
            case nodes.CondExpr(expr1=one, expr2=other) | nodes.And(left=one, right=other) | nodes.Or(left=one, right=other):
                return self._is_part(one, loop, parts) and self._is_part(other, loop, parts)
            case nodes.List(items=items) | nodes.Tuple(items=items):
                return all(self._is_part(item, loop, parts) for item in items)
        return False

    # --- what is known

    def _is_known(self, node: nodes.Node) -> bool:
        match node:
            case nodes.For():
                return not node.recursive
            case nodes.List(items=items) | nodes.Tuple(items=items) | nodes.Dict(items=items):
                return len(items) <= _MAX_TEXT
            case nodes.Mod():  # '%1000000s' % text
                return isinstance(node.right, nodes.Const) and isinstance(node.right.value, int)
            case nodes.Getattr(attr=attr):
                return not attr.startswith("_")
            case nodes.Call(node=nodes.Name(name=name)):
                return name in _FUNCTIONS and name not in self._assigned and _arguments_are_known(node)
            case nodes.Filter() | nodes.Call(node=nodes.Getattr()):
                assert isinstance(node, nodes.Filter | nodes.Call)
                name, whole = _applied(node)
                if name in _READING:  # what is read is not read again: quotes of quotes double at each level
                    inner: list[nodes.Filter | nodes.Call] = []
                    if whole is not None:
                        inner += _with_inner(whole, nodes.Filter)
                        inner += _with_inner(whole, nodes.Call)
                    return _arguments_are_known(node) and not any(_applied(one)[0] in _READING for one in inner)
                return name in _KEEPING and _arguments_are_known(node)
        return type(node) in _KNOWN

    # --- what grows

    def _grown(self, value: nodes.Node | None) -> int:
        """How many variables go into ``value`` whole: a variable to which two are set could double at each turn of a loop. 2 also for one
        that something makes larger."""
        match value:
            case None | nodes.Const() | nodes.Compare() | nodes.Test() | nodes.Not():
                return 0
            case nodes.Name(name=name):
                return int(name in self._assigned)
            case nodes.Getattr(node=whole, attr=attr):
                return max(int(attr in self._assigned), self._grown(whole))
            case nodes.Getitem(node=whole):
                return self._grown(whole)
            case nodes.Filter(name=name, node=whole, args=arguments):
                return self._grown_by(name, [whole, *arguments])
            case nodes.Call(node=nodes.Getattr(node=whole, attr=name), args=arguments):
                return self._grown_by(name, [whole, *(arguments if name in _WITH_DEFAULT else ())])
            case nodes.CondExpr(expr1=one, expr2=other) | nodes.And(left=one, right=other) | nodes.Or(left=one, right=other):
                return max(self._grown(one), self._grown(other))
        return sum(map(self._grown, value.iter_child_nodes()))

    def _grown_by(self, name: str, parts: list[nodes.Node | None]) -> int:
        if name in ("length", "count"):
            return 0
        grown = max(map(self._grown, parts))
        return 2 if grown and name in _READING else grown

    # --- loops

    def _statement_is_bounded(self, node: nodes.Node, loops: tuple[nodes.For, ...]) -> bool:
        if isinstance(node, nodes.For):
            if len(loops) >= _MAX_DEPTH or not self._run_is_bounded(node.iter, loops):
                return False
            parts = [*node.body, *node.else_, *([node.test] if node.test is not None else [])]
            return all(self._statement_is_bounded(part, (*loops, node)) for part in parts)
        if loops and isinstance(node, nodes.Filter | nodes.Call):
            name, whole = _applied(node)
            scans = name in _READING or (len(loops) > 1 and name in _KEEPING and name not in _AT_ONCE)
            if scans and not self._is_part(whole, loops[-1], self._parts):
                return False
        if len(loops) > 1 and isinstance(node, nodes.Operand) and node.op in ("in", "notin"):
            return self._is_part(node.expr, loops[-1], self._parts)
        return all(self._statement_is_bounded(part, loops) for part in node.iter_child_nodes())

    def _run_is_bounded(self, run: nodes.Node, loops: tuple[nodes.For, ...]) -> bool:
        """``run``: what a loop within ``loops`` runs over."""
        if loops:
            return self._is_part(run, loops[-1], self._parts)
        return self._is_list(run, frozenset())

    def _is_list(self, value: nodes.Node | None, seen: frozenset[str]) -> bool:
        """Whether ``value`` is a list that was given (messages, tools), or a stretch of one: not a text, which has more elements."""
        match value:
            case None | nodes.Const(value=None | bool()):
                return True
            case nodes.Name(name=name):
                values = [assign.node for assign, _ in self._assignments if name in _targets(assign.target)]
                return name not in self._moving and (name in seen or all(self._is_list(one, seen | {name}) for one in values))
            case nodes.Getitem(node=whole, arg=nodes.Slice()):
                return self._is_list(whole, seen)
            case nodes.CondExpr(expr1=one, expr2=other) | nodes.And(left=one, right=other) | nodes.Or(left=one, right=other):
                return self._is_list(one, seen) and self._is_list(other, seen)
        return False


def _arguments_are_known(node: nodes.Filter | nodes.Call) -> bool:
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        return False
    name, _ = _applied(node)
    given = [*node.args, *(pair.value for pair in node.kwargs)]
    if name in _KEEPING or name in ("namespace", "raise_exception"):
        return True
    plain = [one.value for part in given for one in _with_inner(part, nodes.Const)]
    if not all(isinstance(part, nodes.Const | nodes.Tuple | nodes.List) for part in given):
        return False
    if name == "strftime_now":  # a width would be a number in the form
        return all(isinstance(form, str) and len(form) <= _MAX_TEXT and not any(map(str.isdigit, form)) for form in plain)
    if name == "replace":
        return len(plain) == 2 and all(isinstance(text, str) for text in plain) and len(plain[1]) <= len(plain[0])
    return all(
        value is None or (isinstance(value, str) and len(value) <= _MAX_TEXT) or (isinstance(value, int) and value <= _MAX_NUMBER)
        for value in plain
    )


def _with_inner(node: nodes.Node, kind: type[_N]) -> list[_N]:
    """``node`` and those in it, as far as they are of this kind."""
    return [*([node] if isinstance(node, kind) else []), *node.find_all(kind)]


def _applied(node: nodes.Filter | nodes.Call) -> tuple[str, nodes.Node | None]:
    """The name of a filter, a method or a function, and what it is applied to."""
    if isinstance(node, nodes.Filter):
        return node.name, node.node
    callee = node.node
    return (callee.attr, callee.node) if isinstance(callee, nodes.Getattr) else (getattr(callee, "name", ""), None)


def _targets(target: nodes.Node) -> Iterator[str]:
    """The names that a ``set`` or a loop gives."""
    match target:
        case nodes.Name(name=name):
            yield name
        case nodes.NSRef(attr=attr):
            yield attr
        case nodes.Tuple(items=items):
            for item in items:
                yield from _targets(item)


def _assignments(node: nodes.Node, loops: tuple[nodes.For, ...]) -> Iterator[tuple[nodes.Assign, tuple[nodes.For, ...]]]:
    for child in node.iter_child_nodes():
        if isinstance(child, nodes.Assign):
            yield child, loops
        yield from _assignments(child, (*loops, child) if isinstance(child, nodes.For) else loops)
