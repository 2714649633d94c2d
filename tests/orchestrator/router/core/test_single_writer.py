"""Each state of the routing core is written by its owner alone; checked on the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.router.core.choice_state import ChoiceState, RequestState
from orchestrator.router.core.fair_order import TenantAccount
from orchestrator.router.core.replica_registry import Replica
from orchestrator.router.core.stats import Attempt

ROOT = Path(__file__).resolve().parents[4] / "orchestrator"
CORE = ROOT / "router" / "core"
#: The modules into whose hands a record of the core comes.
HOLDERS = [*sorted(CORE.rglob("*.py")), ROOT / "router/dispatcher.py", ROOT / "sim/sim_router.py"]
#: What changes its owner: methods of lists, dicts, sets and deques.
CHANGES = {"append", "add", "clear", "extend", "insert", "pop", "popitem", "popleft", "remove", "setdefault", "update", "move_to_end"}
#: Fields by the one module that may write them on another object than itself.
OWNED = {
    "request_table.py": {*ChoiceState.__slots__, *RequestState.__slots__, *Attempt.__struct_fields__},
    "replica_registry.py": set(Replica.__slots__),
    "fair_order.py": set(TenantAccount.__slots__),
}
#: The one method that fills a new record of a class of another module.
RESTORED = (CORE / "choice_state.py", "restored")


def writes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, field) of each write to a field of an object that is not the method's own."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            targets = [node.func.value]
        for target in targets:
            for one in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                while isinstance(one, ast.Subscript):
                    one = one.value
                if isinstance(one, ast.Attribute) and not (isinstance(one.value, ast.Name) and one.value.id == "self"):
                    yield one.lineno, one.attr


def test_a_write_is_seen() -> None:
    tree = ast.parse("row.phase = 1\nself.phase = 2\na.b.streams[3] += 1\nx, row.stream = 1, 2\ndel row.trail[0]\nrow.trail.append(1)")
    assert list(writes(tree)) == [(1, "phase"), (3, "streams"), (4, "stream"), (5, "trail"), (6, "trail")]


@pytest.mark.parametrize("path", HOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_owner_writes(path: Path) -> None:
    others = set().union(*(fields for owner, fields in OWNED.items() if path != CORE / owner))
    own = OWNED.get(path.name, set()) if path.parent == CORE else set()
    tree = ast.parse(path.read_text())
    new = {line for node in ast.walk(tree) if path == RESTORED[0] and isinstance(node, ast.FunctionDef) and node.name == RESTORED[1]
           for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}  # fmt: skip
    found = [f"line {line}: {field}" for line, field in writes(tree) if field in others - own and line not in new]
    assert not found, f"{path.name} writes state of another owner: {found}"
