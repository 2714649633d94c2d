"""The layer law: which module may import which, checked on every module's syntax tree and then in real interpreters.

Beside it two laws of names: a class name stands in one module only and says what the class does, and test modules do not import
from each other.

Owns the table; a new module gets its row here before it gets a line of code. The table is `docs/design.md`, "Layers".
"""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.support.source_tree import PACKAGES, ROOT, UNSAFE, imports, modules, parsed, within

#: The longest prefix decides. A module may import its own layer and lower ones. Process entries (``__main__``) are of the highest layer.
ENTRY_LAYER = 5
LAYERS = {
    "workers.protocol": 0, "orchestrator.config.engine_settings": 0,
    "orchestrator.config.router_spec": 0,
    "workers.scheduler": 1, "workers.layout": 1, "workers.sampling.definition": 1, "workers.sampling.guide": 1,
    "workers.sampling.token_rules": 1,
    "workers.serving.router_link": 1, "workers.serving.stream_table": 1,
    "orchestrator.router.core": 1, "orchestrator.control.reconciler": 1,
    "orchestrator.control.rollout": 1, "orchestrator.planner": 1,
    "orchestrator.loadgen.prompts": 1, "orchestrator.loadgen.schedule": 1, "orchestrator.loadgen.settings": 1,
    "orchestrator.loadgen.stats": 1,
    "workers.models.families": 1, "workers.models.registry": 1,
    "workers.engines.fake": 2, "workers.engines.scheduled": 2, "orchestrator.sim": 2,
    "workers.artifacts": 3, "workers.distributed": 3, "workers.files": 3, "workers.kernels": 3, "workers.models": 3, "workers.runner": 3,
    "workers.sampling": 3,
    "workers.engines": 4, "workers.epoch": 4, "workers.logs": 4, "workers.process": 4, "workers.rank": 4,
    "workers.sampling.grammar_checker": 4, "workers.serving": 4, "workers.zmq_options": 4,
    "orchestrator.auth": 4, "orchestrator.client": 4, "orchestrator.config": 4, "orchestrator.control": 4, "orchestrator.files": 4,
    "orchestrator.hub": 4, "orchestrator.tokenizer_build": 4,
    "orchestrator.loadgen": 4, "orchestrator.model_store": 4, "orchestrator.router": 4, "orchestrator.slurm": 4,
    "orchestrator.cli": 5, "trireme": 5,
}  # fmt: skip

#: Third-party packages that a layer adds to those below it; layers 4 and 5 are open but for FORBIDDEN.
THIRD_PARTY = {
    0: {"msgspec"},
    1: {"numpy"},
    2: set(),
    3: {"torch", "mpi4py", "safetensors", "tokenizers", "llguidance", "triton", "psutil"},
}
OPEN_LAYER = 4

#: Standard modules that would let time, chance or the machine into a state machine.
IMPURE = {
    "asyncio", "threading", "os", "time", "random", "logging", "multiprocessing", "subprocess", "socket", "secrets", "signal", "sys",
    "select", "concurrent", "queue", "tempfile", "pathlib", "io", "datetime",
}  # fmt: skip

#: (who, what they never import, why).
FORBIDDEN = (
    ("workers", {"orchestrator"}, "a replica is complete alone"),
    ("workers", {"ray", "starlette", "uvicorn", "uvloop", "httptools", "httpx", "jinja2", "typer", "rich"}, "a replica needs none of it"),
    ("workers.artifacts", {"torch", "mpi4py"}, "conversion runs where no engine is installed"),
    ("orchestrator", {"torch", "mpi4py", "triton"}, "routers, clients and controllers run on hosts without an engine"),
    ("orchestrator.client", {"starlette", "uvicorn", "ray", "typer", "rich"}, "an internal client installs pyzmq and msgspec only"),
    ("orchestrator.router", {"ray"}, "routers are plain processes"),
    ("orchestrator", {"trireme"}, "the public package is for users; import what it re-exports"),
    ("workers", {"trireme"}, "the public package is for users; import what it re-exports"),
)

#: Modules of the project that the public package may import; the rest of the project is internal.
PUBLIC = ("orchestrator.client", "workers.protocol", "workers.__version__")

ENVIRONMENT = {"environ", "environb", "getenv", "putenv", "unsetenv"}
ENVIRONMENT_READERS = ("orchestrator.config.deployment_file",)


def layer(module: str) -> int | None:
    """The layer of a module; None for one that the table does not know."""
    if module in LAYERS:
        return LAYERS[module]
    if module in PACKAGES:
        return 0
    if module.endswith(".__main__"):
        return ENTRY_LAYER
    matches = [prefix for prefix in LAYERS if within(module, prefix)]
    return LAYERS[max(matches, key=len)] if matches else None


def import_fault(module: str, own: int, target: str) -> str | None:
    """Why ``module`` of layer ``own`` must not import ``target``; None when it may."""
    top = target.split(".")[0]
    for who, what, why in FORBIDDEN:
        if within(module, who) and top in what:
            return f"imports {top}: {why}"
    if top in UNSAFE:
        return f"imports {top}: nothing here may run code that arrived as data"
    if module == "trireme" and top in PACKAGES and not any(within(target, prefix) for prefix in PUBLIC):
        return f"imports {target}: the public package may import {', '.join(PUBLIC)}"
    if top in PACKAGES:
        other = layer(target)
        if other is None:
            other = layer(target.rpartition(".")[0]) or 0
        return f"imports {target} of layer {other}, itself being layer {own}" if other > own else None
    if own <= 1 and top in IMPURE:
        return f"imports {top}: layers 0 and 1 are pure; time, chance and the machine are arguments"
    if own < OPEN_LAYER and top not in sys.stdlib_module_names:
        allowed = set().union(*(THIRD_PARTY[below] for below in range(own + 1)))
        if top not in allowed:
            return f"imports {top}: layer {own} may use {', '.join(sorted(allowed))} and the standard library"
    return None


def violations(module: str, source: str, *, package: bool = False) -> list[str]:
    """Every breach of the law in one module, a line each: ``module:line: what``."""
    own = layer(module)
    if own is None:
        return [f"{module}: has no layer; give it a row in tests/test_layers.py and docs/design.md"]
    tree = parsed(source)
    found = [(line, fault) for line, target in imports(module, tree, package=package) if (fault := import_fault(module, own, target))]
    reads_environment = own == ENTRY_LAYER or module in ENVIRONMENT_READERS
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and isinstance(node.value, ast.Name) and node.value.id == "os":
            name = f"os.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and (names := {a.name for a in node.names} & ENVIRONMENT):
            name = f"os.{min(names)}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
            found.append((node.lineno, f"calls {node.func.id}"))
            continue
        else:
            continue
        if not reads_environment:
            found.append((node.lineno, f"touches {name}: only layer 5 and {', '.join(ENVIRONMENT_READERS)} may; pass the value in"))
    return [f"{module}:{line}: {fault}" for line, fault in sorted(set(found))]


def test_every_module_keeps_its_layer() -> None:
    files = modules()
    assert {"workers.protocol.messages", "orchestrator.config.router_spec"} <= files.keys()
    found = [fault for name, path in files.items() for fault in violations(name, path.read_text(), package=path.name == "__init__.py")]
    assert not found, "\n" + "\n".join(found)


def test_no_two_modules_define_a_class_of_the_same_name() -> None:
    """One name means one thing in all of the project. Private classes, whose names begin with an underscore, are left out."""
    homes: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in parsed(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}
    assert [name for name in homes if name.startswith("Base") or name.endswith(("Base", "Manager"))] == [], "say what it does"


def test_no_test_module_imports_another() -> None:
    """What several test modules need stands in tests/support, so that each of them can be read, moved and run alone."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for line, target in imports(name, parsed(path.read_text())):
            if target.startswith("tests.") and any(part.startswith("test_") for part in target.split(".")[:-1]):
                found.append(f"{name}:{line}: imports {target}")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("workers.scheduler.scheduler", "import torch", "imports torch"),
        ("workers.scheduler.scheduler", "def f():\n    import time", ":2: imports time"),
        (
            "workers.scheduler.scheduler",
            "from workers.distributed import group",
            "imports workers.distributed.group of layer 3, itself being layer 1",
        ),
        ("workers.scheduler.scheduler", "from ..distributed.group import Group", "imports workers.distributed.group.Group of layer 3"),
        ("workers.protocol.specs", "import numpy", "layer 0 may use msgspec"),
        ("workers.serving.leader", "from orchestrator.config.router_spec import RouterSpec", "a replica is complete alone"),
        ("workers.serving.leader", "import ray", "imports ray"),
        ("workers.artifacts.gguf", "import torch", "conversion runs where no engine is installed"),
        ("workers.models.decoder", "import zmq", "layer 3 may use"),
        ("workers.distributed.group", "import os\nx = os.environ['HOME']", "touches os.environ"),
        ("orchestrator.router.rpc.server", "from os import getenv", "touches os.getenv"),
        ("orchestrator.client.sync_client", "import uvicorn", "pyzmq and msgspec only"),
        ("orchestrator.control.host.deployment", "import torch", "hosts without an engine"),
        ("orchestrator.control.host.deployment", "from orchestrator.cli import main", "of layer 5, itself being layer 4"),
        ("orchestrator.cli.main", "import pickle", "may run code that arrived as data"),
        ("orchestrator.cli.main", "eval('1')", "calls eval"),
        ("trireme", "from orchestrator.router.process import main", "the public package may import"),
        ("orchestrator.cli.main", "from trireme import Client", "the public package is for users"),
        ("orchestrator.invented", "", "has no layer"),
    ],
)
def test_a_breach_is_named(module: str, source: str, fault: str) -> None:
    found = violations(module, source)
    assert len(found) == 1 and fault in found[0] and found[0].startswith(module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "workers.scheduler.scheduler",
            "import numpy\nfrom workers.protocol.messages import Submit\nfrom workers.scheduler.step_plan import StepPlan",
        ),
        ("workers.engines.portable", "import torch\nimport zmq\nimport threading\nfrom workers import __version__"),
        ("orchestrator.config.deployment_file", "import os\nhome = os.environ"),
        ("orchestrator.cli.main", "import os\nhome = os.environ"),
        ("trireme", "from orchestrator.client import Client\nfrom workers import __version__"),
    ],
)
def test_what_the_law_allows_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


#: GPU kernels are left out where Triton is not installed: torch brings it only for CUDA.
IMPORTER = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
print(*{name.split(".")[0] for name in sys.modules})
"""


def loaded(names: list[str]) -> set[str]:
    """Top-level packages in ``sys.modules`` of a fresh interpreter that imported ``names``."""
    ran = subprocess.run([sys.executable, "-c", IMPORTER, *names], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


@pytest.mark.parametrize(
    ("prefix", "absent"),
    [
        ("workers.scheduler", {"torch", "mpi4py", "zmq", "ray"}),
        ("workers.artifacts", {"torch", "mpi4py", "ray", "orchestrator"}),
        ("orchestrator.router.core", {"torch", "mpi4py", "zmq", "ray"}),
        ("orchestrator.sim", {"torch", "mpi4py", "zmq", "ray"}),
        ("orchestrator.client", {"torch", "mpi4py", "ray", "starlette", "uvicorn"}),
        ("orchestrator.router", {"torch", "mpi4py", "ray"}),
        ("orchestrator", {"torch", "mpi4py"}),
        ("workers", {"ray", "orchestrator"}),
    ],
)
def test_importing_leaves_out(prefix: str, absent: set[str]) -> None:
    names = [name for name in modules() if within(name, prefix) and not name.endswith("__main__")]
    if not names:
        pytest.skip(f"no module under {prefix} yet")
    assert not (present := absent & loaded(names)), f"importing {prefix} brings in {', '.join(sorted(present))}"


def import_graph(sources: dict[str, str], packages: set[str]) -> dict[str, set[str]]:
    """Module -> the project's modules that it imports, at its top or inside functions. ``packages``: the modules that are ``__init__``."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        targets = graph[module] = set()
        for _, target in imports(module, parsed(source), package=module in packages):
            found = target if target in sources else target.rpartition(".")[0]
            if found in sources and found != module:
                targets.add(found)
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that all reach each other (strongly connected components of more than one node), by Tarjan's algorithm."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], index[target])
        if lowest[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def cycles_at_every_level(graph: dict[str, set[str]]) -> list[list[str]]:
    """Cycles among modules, and among the siblings inside each package, where a package stands for all that it contains."""
    found = cycles(graph)
    parents = {"", *(module.rsplit(".", depth)[0] for module in graph for depth in range(1, module.count(".") + 1))}
    for parent in sorted(parents):
        depth = parent.count(".") + 1 if parent else 0
        siblings: dict[str, set[str]] = {}
        for module, targets in graph.items():
            for target in targets:
                if parent and not (module.startswith(parent + ".") and target.startswith(parent + ".")):
                    continue
                one, other = (".".join(name.split(".")[: depth + 1]) for name in (module, target))
                if one != other:
                    siblings.setdefault(one, set()).add(other)
        found += [cycle for cycle in cycles(siblings) if cycle not in found]
    return found


def test_no_package_and_no_module_imports_in_a_circle() -> None:
    files = modules()
    graph = import_graph(
        {name: path.read_text() for name, path in files.items()}, {name for name, path in files.items() if path.name == "__init__.py"}
    )
    found = cycles_at_every_level(graph)
    assert not found, "\n" + "\n".join(" <-> ".join(cycle) for cycle in found)


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a.x": "from a import y", "a.y": "def f():\n    import a.x"}, [["a.x", "a.y"]]),
        ({"a.x": "import b.y", "b.y": "", "b.z": "from a.w import f", "a.w": ""}, [["a", "b"]]),
        ({"p.a.x": "from p.b import y", "p.b.y": "", "p.b.z": "from ..a import w", "p.a.w": ""}, [["p.a", "p.b"]]),
        ({"p.a": "from p.b import y", "p.b.y": "from p import a"}, [["p.a", "p.b.y"], ["p.a", "p.b"]]),
        ({"a.x": "from b import y", "b.y": "import b.z", "b.z": ""}, []),
    ],
)
def test_a_circle_is_named(sources: dict[str, str], found: list[list[str]]) -> None:
    assert cycles_at_every_level(import_graph(sources, set())) == found
