"""Reads what a module uses of TensorRT-LLM from its syntax tree and holds it against ``tests/contracts/tensorrt_llm_api.json``.

Types are followed from imports, annotations, constructors and the return types below, through assignments, loops and attributes; each
keyword, attribute, method and enum member reached so must be in the contract. A name that cannot be typed is not judged, so
:attr:`Reader.seen` says what was.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec

from workers.protocol import trtllm_options
from workers.protocol.specs import ReplicaSpec, TrtllmSpec

CONTRACT: dict[str, Any] = json.loads((Path(__file__).parents[1] / "contracts" / "tensorrt_llm_api.json").read_text())
PYTHON: dict[str, Any] = CONTRACT["python"]
TRT = "tensorrt_llm.bindings.executor."

#: Our own structs whose fields are followed to what is passed on with ``**given(...)``.
STRUCTS = {"TrtllmSpec": TrtllmSpec, "ReplicaSpec": ReplicaSpec} | {
    name: kind for name, kind in vars(trtllm_options).items() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
}


class Type(NamedTuple):
    """``kind``: module, class, object, list, method, union (narrow it), struct (ours). ``name``: dotted path, or the method's class."""

    kind: str
    name: str
    inner: Any = None


def an(name: str) -> Type:
    return Type("object", TRT + name)


def many(name: str) -> Type:
    return Type("list", "", an(name))


ATTRIBUTES = {
    (TRT + "Response", "result"): an("Result"),
    (TRT + "IterationStats", "kv_cache_stats"): an("KvCacheStats"),
    (TRT + "IterationStats", "inflight_batching_stats"): an("InflightBatchingStats"),
    (TRT + "kv_cache.KVCacheEvent", "data"): Type("union", "KVCacheEvent.data"),
    (TRT + "kv_cache.KVCacheStoredData", "blocks"): many("kv_cache.KVCacheStoredBlockData"),
    (TRT + "kv_cache.KVCacheStoredBlockData", "tokens"): many("kv_cache.UniqueToken"),
    ("tensorrt_llm.llmapi.RequestOutput", "outputs"): Type("list", "", Type("object", "tensorrt_llm.llmapi.CompletionOutput")),
}
RETURNS = {
    (TRT + "Executor", "await_responses"): many("Response"),
    (TRT + "Executor", "get_latest_iteration_stats"): many("IterationStats"),
    (TRT + "Executor", "get_kv_cache_event_manager"): an("kv_cache.KVCacheEventManager"),
    (TRT + "kv_cache.KVCacheEventManager", "get_latest_events"): many("kv_cache.KVCacheEvent"),
    ("tensorrt_llm.LLM", "generate_async"): Type("object", "tensorrt_llm.llmapi.RequestOutput"),
}


def parameters(entry: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """The overloads of a constructor, each name -> parameter; pydantic classes with their bases' fields and aliases."""
    if "init_fields_from" in entry:
        return parameters(PYTHON[entry["init_fields_from"]])
    if "init_overloads" in entry:
        return [{p["name"]: p for p in overload} for overload in entry["init_overloads"]]
    found = {p["name"]: p for base in entry.get("bases", ()) for p in parameters(PYTHON[base])[0].values()}
    found |= {alias: {"name": alias} for alias in entry.get("aliases", {}).values()}
    found |= {p["name"]: p for p in (*entry.get("init", ()), *entry.get("fields", ()))}
    return [{name: p for name, p in found.items() if name not in entry.get("not_in_1_2", ())}]


def attributes(entry: dict[str, Any]) -> set[str]:
    return {*entry.get("attributes", ()), *(p["name"] for p in entry.get("fields", ()))}


def lookup(module: str, name: str) -> Type | None:
    """What ``module.name`` is by the contract; None = no such thing."""
    path = f"{module}.{name}"
    if path in PYTHON:
        return Type("class", path)
    for other, entry in PYTHON.items():
        if entry.get("import_from") == module and other.rpartition(".")[2] == name:
            return Type("class", other)
    return Type("module", path) if any(other.startswith(path + ".") for other in PYTHON) else None


class Reader:
    """One module. ``faults``: uses that the contract lacks, ``line: what``; ``seen``: judged uses; ``unverified``: those from memory."""

    def __init__(self, source: str) -> None:
        self.faults: list[str] = []
        self.seen: set[str] = set()
        self.unverified: set[str] = set()
        self._members: dict[str, Type | None] = {}
        tree = ast.parse(source)
        self._globals: dict[str, Type | None] = {}
        for node in ast.walk(tree):
            self._import(node)
        self._statements(tree.body, self._globals)

    # --- names

    def _import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "tensorrt_llm":
                    self._globals[alias.asname or alias.name.split(".")[0]] = Type("module", alias.name if alias.asname else "tensorrt_llm")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tensorrt_llm":
            for alias in node.names:
                found = lookup(node.module or "", alias.name)
                self._judge(node, f"{node.module}.{alias.name}", found is not None)
                self._globals[alias.asname or alias.name] = found

    def _annotation(self, node: ast.expr | None) -> Type | None:
        if isinstance(node, ast.BinOp):
            return self._annotation(node.left)
        if isinstance(node, ast.Name) and node.id in STRUCTS:
            return Type("struct", node.id)
        if isinstance(node, ast.Attribute):
            found = self._type(node, {})
            return Type("object", found.name) if found is not None and found.kind == "class" else None
        return None

    def _judge(self, node: ast.AST, what: str, ok: bool, confidence: str = "read") -> None:
        self.seen.add(what)
        if not ok:
            self.faults.append(f"{getattr(node, 'lineno', 0)}: {what}")
        elif confidence == "memory":
            self.unverified.add(what)

    # --- statements

    def _statements(self, body: list[ast.stmt], env: dict[str, Type | None]) -> None:
        for node in body:
            self._statement(node, env)

    def _statement(self, node: ast.stmt, env: dict[str, Type | None]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = dict(env)
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                inner[argument.arg] = self._annotation(argument.annotation)
            self._statements(node.body, inner)
        elif isinstance(node, ast.ClassDef):
            self._members = {}
            self._statements(sorted(node.body, key=lambda item: getattr(item, "name", "") != "__init__"), env)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value, env)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self._type(node.value, env)
            self._set(node.target, self._annotation(node.annotation), env)
        elif isinstance(node, ast.For | ast.AsyncFor):
            found = self._type(node.iter, env)
            self._set(node.target, found.inner if found is not None and found.kind == "list" else None, env)
            self._statements([*node.body, *node.orelse], env)
        elif isinstance(node, ast.If):
            self._type(node.test, env)
            self._statements(node.body, env | self._narrowed(node.test, env))
            self._statements(node.orelse, env)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self._statement(child, env)
                elif isinstance(child, ast.expr):
                    self._type(child, env)
                elif isinstance(child, ast.ExceptHandler | ast.withitem):
                    self._parts(child, env)

    def _parts(self, node: ast.AST, env: dict[str, Type | None]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self._statement(child, env)
            elif isinstance(child, ast.expr):
                self._type(child, env)

    def _bind(self, target: ast.expr, value: ast.expr, env: dict[str, Type | None]) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._bind(one, other, env)
        else:
            self._set(target, self._type(value, env), env)

    def _set(self, target: ast.expr, found: Type | None, env: dict[str, Type | None]) -> None:
        if isinstance(target, ast.Name):
            # None forgets nothing that an annotation told: `x = None` before `x = make()`.
            if found is not None or target.id not in env:
                env[target.id] = found
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            self._members[target.attr] = found
        elif isinstance(target, ast.Attribute):
            self._type(target, env)

    def _narrowed(self, test: ast.expr, env: dict[str, Type | None]) -> dict[str, Type | None]:
        match test:
            case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name(id=name), kind]):
                found = self._type(kind, env)
                if found is not None and found.kind == "class":
                    return {name: Type("object", found.name)}
        return {}

    # --- expressions

    def _type(self, node: ast.expr, env: dict[str, Type | None]) -> Type | None:
        match node:
            case ast.Name(id=name):
                return env.get(name, self._globals.get(name))
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return self._members.get(name)
            case ast.Attribute(value=value, attr=name):
                return self._attribute(node, self._type(value, env), name)
            case ast.Call():
                return self._call(node, env)
            case ast.Subscript(value=value):
                self._parts(node.slice, env)
                found = self._type(value, env)
                return found.inner if found is not None and found.kind == "list" else None
            case ast.IfExp(test=test, body=body, orelse=other):
                self._type(test, env)
                return self._type(body, env) or self._type(other, env)
            case ast.ListComp(elt=element, generators=generators) | ast.GeneratorExp(elt=element, generators=generators):
                inner = dict(env)
                for generator in generators:
                    found = self._type(generator.iter, inner)
                    self._set(generator.target, found.inner if found is not None and found.kind == "list" else None, inner)
                return Type("list", "", self._type(element, inner))
            case ast.Lambda(body=body):
                return self._type(body, env)
            case _:
                self._parts(node, env)
                return None

    def _attribute(self, node: ast.AST, base: Type | None, name: str) -> Type | None:
        if base is None or base.kind in ("list", "method"):
            return None
        if base.kind == "struct":
            found = getattr(STRUCTS[base.name], name, None)
            if isinstance(found, property):
                kind = get_type_hints(found.fget)["return"]
            else:
                kind = {field.name: field.type for field in msgspec.structs.fields(STRUCTS[base.name])}.get(name)
            inner = next((k for k in (kind, *get_args(kind)) if isinstance(k, type) and k.__name__ in STRUCTS), None)
            return Type("struct", inner.__name__) if inner is not None else None
        if base.kind == "module":
            found = lookup(base.name, name)
            self._judge(node, f"{base.name}.{name}", found is not None)
            return found
        if base.kind == "union":
            self._judge(node, f"{base.name}.{name} before isinstance", False)
            return None
        entry, what = PYTHON[base.name], f"{base.name}.{name}"
        if base.kind == "class":
            if what in PYTHON:
                return Type("class", what)
            known = {*entry.get("members", ()), *entry.get("static_factories", ()), *entry.get("constants", ())}
            self._judge(node, what, name in known, entry.get("confidence", "read"))
            return None
        methods = {*entry.get("methods", ()), *entry.get("method_overloads", ())}
        self._judge(node, what, name in attributes(entry) | methods, entry.get("confidence", "read"))
        return Type("method", base.name, name) if name in methods else ATTRIBUTES.get((base.name, name))

    def _call(self, node: ast.Call, env: dict[str, Type | None]) -> Type | None:
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name)), *_]):
                self._probe(node, self._type(owner, env), name)
                return None
            case ast.Call(func=ast.Name(id="list"), args=[inner]):
                return self._type(inner, env)
        called = self._type(node.func, env)
        for argument in node.args:
            self._type(argument, env)
        for keyword in node.keywords:
            self._type(keyword.value, env)
        if called is None or called.kind not in ("class", "method"):
            return None
        entry = PYTHON[called.name]
        if called.kind == "class":
            self._arguments(node, called.name, parameters(entry), env, entry.get("confidence", "read"))
            return Type("object", called.name)
        overloads = entry.get("method_overloads", {}).get(called.inner) or [entry["methods"][called.inner]]
        self._arguments(node, f"{called.name}.{called.inner}", [{p["name"]: p for p in o} for o in overloads], env)
        return RETURNS.get((called.name, called.inner))

    def _probe(self, node: ast.AST, owner: Type | None, name: str) -> None:
        """``getattr(x, "name", None)``: looked for, so it may be one that the contract calls unverified."""
        if owner is not None and owner.kind == "object":
            entry = PYTHON[owner.name]
            unsure = name in entry.get("unverified_methods", ())
            self._judge(node, f"{owner.name}.{name}", unsure or name in attributes(entry), "memory" if unsure else "read")

    def _arguments(
        self, node: ast.Call, what: str, overloads: list[dict[str, Any]], env: dict[str, Type | None], confidence: str = "read"
    ) -> None:
        names = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
        spread: list[str] = []
        for keyword in node.keywords:
            if keyword.arg is None:
                passed = list(self._passed(keyword.value, env))
                self._judge(node, f"{what}(**?)", bool(passed))
                spread += passed
        self._judge(node, f"{what}: by keyword", not node.args)
        fitting = [o for o in overloads if {*names, *spread} <= o.keys()] or overloads[:1]
        for name in (*names, *spread):
            versions = fitting[0].get(name, {}).get("seen_in", ("1.2.0rc",))
            self._judge(node, f"{what}({name}=)", name in fitting[0] and "1.2.0rc" in versions, confidence)
        missing = {name for name, p in fitting[0].items() if p.get("required")} - {*names, *spread}
        self._judge(node, f"{what} without {', '.join(sorted(missing))}", not missing)

    def _passed(self, node: ast.expr, env: dict[str, Type | None]) -> Iterator[str]:
        """Every keyword that ``**node`` may pass: the fields of the struct in ``given(struct)``."""
        match node:
            case ast.IfExp(body=ast.Dict(keys=[]), orelse=inner):
                yield from self._passed(inner, env)
            case ast.Call(func=ast.Name(id="given"), args=[inner]):
                found = self._type(inner, env)
                if found is not None and found.kind == "struct":
                    yield from STRUCTS[found.name].__struct_fields__
