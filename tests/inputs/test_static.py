"""What the code may never do, read off its syntax trees; and what importing it must not do.

Beside the layer law (:mod:`tests.test_layers`), which forbids modules and the environment, this forbids calls.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source_tree import ROOT, UNSAFE, modules, parsed

#: Calls by their dotted end, and why not. A name without a dot is banned as a bare call and as an attribute.
BANNED = {
    "eval": "runs text", "exec": "runs text", "compile": "makes code of text", "__import__": "imports by text",
    "os.system": "a shell reads what is in the line", "os.popen": "a shell reads what is in the line",
    "subprocess.getoutput": "a shell", "subprocess.getstatusoutput": "a shell", "create_subprocess_shell": "a shell",
    "recv_pyobj": "unpickles what came over a socket", "send_pyobj": "pickles", "recv_serialized": "names its own decoder",
    "torch.load": "unpickles", "np.load": "may unpickle", "read_pickle": "unpickles",
    "yaml.load": "makes any object", "yaml.unsafe_load": "makes any object", "yaml.full_load": "makes any object",
    "yaml.load_all": "makes any object", "from_pretrained": "fetches, and may run code of the model",
    "tempfile.mktemp": "somebody else may make the file first", "urlopen": "fetches", "urlretrieve": "fetches",
    "httpx.get": "fetches", "httpx.stream": "fetches", "hf_hub_download": "fetches",
    "snapshot_download": "fetches", "jinja2.Template": "renders outside the sandbox", "ctypes.CDLL": "loads what a path names",
    "load_library": "loads code", "ssl._create_unverified_context": "believes anyone",
}  # fmt: skip
#: Where one is right, and why: (module, call).
ALLOWED = {
    ("orchestrator.config.yaml_tree", "yaml.load"): "its loader is a SafeLoader that knows lines",
    ("orchestrator.tokenizer_build.__main__", "from_pretrained"): "of a local folder alone, and without its code",
    ("orchestrator.hub.download", "hf_hub_download"): "fetching is what it is for; it links a file whose hash was compared",
}
#: Keyword arguments that turn a safe call into another one.
BANNED_KEYWORDS = {("shell", True), ("allow_pickle", True), ("trust_remote_code", True), ("verify", False), ("weights_only", False)}
BUILTINS = ("eval", "exec", "compile", "__import__")


def _is_none(call: ast.Call) -> bool:
    return bool(call.args) and isinstance(call.args[0], ast.Constant) and call.args[0].value is None


def calls(tree: ast.AST) -> Iterator[tuple[int, str, ast.Call]]:
    """(line, dotted name as written, call) of every call whose target has a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts, target = [], node.func
            while isinstance(target, ast.Attribute):
                parts.append(target.attr)
                target = target.value
            if isinstance(target, ast.Name):
                parts.append(target.id)
            if parts:
                yield node.lineno, ".".join(reversed(parts)), node


def faults(module: str, source: str) -> list[str]:
    """Every banned call of one module, a line each."""
    found = []
    for line, name, call in calls(parsed(source)):
        for banned, why in BANNED.items():
            whole = name == banned or name.endswith("." + banned)
            if banned in BUILTINS and name != banned:
                whole = False  # re.compile, and methods of that name
            if banned == "ctypes.CDLL" and _is_none(call):
                whole = False  # what is linked to Python itself
            if whole and (module, banned) not in ALLOWED:
                found.append(f"{module}:{line}: {name}: {why}")
        for keyword in call.keywords:
            if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in BANNED_KEYWORDS:
                found.append(f"{module}:{line}: {name} with {keyword.arg}={keyword.value.value}")
    return found


def test_no_module_makes_a_banned_call() -> None:
    found = [fault for name, path in modules().items() for fault in faults(name, path.read_text())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "torch.load(f)", "socket.recv_pyobj()", "yaml.load(f)", "os.system('x')", "subprocess.run('x', shell=True)",
        "np.load(f, allow_pickle=True)", "AutoModel.from_pretrained(p)", "httpx.Client(verify=False)", "import os\nos.popen('x')",
        "tempfile.mktemp()", "jinja2.Template(x)", "exec(x)", "ctypes.CDLL(path)",
    ],
)  # fmt: skip
def test_a_banned_call_is_named(source: str) -> None:
    assert faults("orchestrator.invented", source)


@pytest.mark.parametrize(
    "source", ["re.compile('x')", "template.compile()", "msgspec.json.decode(x)", "yaml.safe_load(f)", "ctypes.CDLL(None)"]
)
def test_what_only_sounds_like_one_passes(source: str) -> None:
    assert not faults("orchestrator.invented", source)


def test_files_that_are_run_elsewhere_unpickle_nothing_either() -> None:
    """The bench and what is deployed are not of the packages, and not above the law."""
    for folder in ("bench", "deploy"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = parsed(path.read_text())
            names = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            assert not names & UNSAFE, path


#: Releases below which a package had a hole that reaches us, by their record.
FLOORS = {
    "ray": (2, 52),  # CVE-2025-62593: its dashboard could be driven from a browser; token authentication is of this release
    "torch": (2, 6),  # CVE-2025-32434: torch.load ran code in spite of weights_only
    "jinja2": (3, 1, 5),  # CVE-2024-56201, CVE-2024-56326: ways out of the sandbox
}


def test_dependencies_have_a_floor_above_their_known_holes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    floors: dict[str, tuple[int, ...]] = {}
    for requirement in wanted:
        name, _, floor = requirement.partition(">=")
        if floor:
            floors[name.partition("[")[0].lower()] = tuple(int(part) for part in floor.split(",")[0].split("."))
    for name, floor in FLOORS.items():
        assert floors[name] >= floor, f"{name} may be older than {floor}"


WATCHER = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request", "os.system"):
        raise AssertionError(f"importing does {event}: {arguments}")
sys.addaudithook(watch)
import importlib
for name in %r:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("triton", "tensorrt_llm"):  # they come with a GPU
            raise
print("quiet")
"""


@pytest.mark.parametrize("package", ["orchestrator", pytest.param("workers", marks=pytest.mark.long)])
def test_importing_calls_nobody(package: str) -> None:
    """No address is looked up or called by importing every module there is."""
    names = [name for name in modules() if name.split(".")[0] == package and not name.endswith("__main__")]
    ran = subprocess.run([sys.executable, "-c", WATCHER % names], cwd=Path(ROOT), capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0 and ran.stdout.split() == ["quiet"], ran.stderr[-2000:]
