"""Classes made from ``tests/contracts/tensorrt_llm_api.json``: what it takes is taken, anything else raises as it would there.

Owns the enforcement: unknown or missing keywords are a TypeError (pydantic ones a ValueError), attributes that the contract lacks do not
exist, read-only ones cannot be set. Behaviour is added by ``_executor`` and ``_llm``.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

CONTRACT: dict[str, Any] = json.loads((Path(__file__).parents[2] / "contracts" / "tensorrt_llm_api.json").read_text())
PYTHON: dict[str, Any] = CONTRACT["python"]

Signature = list[dict[str, Any]]


def signatures(entry: dict[str, Any]) -> list[Signature]:
    """The ways in which a class may be constructed."""
    if "init_fields_from" in entry:
        return signatures(PYTHON[entry["init_fields_from"]])
    if "init_overloads" in entry:
        return [list(overload) for overload in entry["init_overloads"]]
    if "fields" in entry:
        fields = {field["name"]: field for base in entry.get("bases", ()) for field in signatures(PYTHON[base])[0]}
        fields |= {field["name"]: field for field in entry["fields"]}
        aliases = {alias for base in (*entry.get("bases", ()),) for alias in PYTHON[base].get("aliases", {}).values()}
        return [[*fields.values(), *({"name": alias, "required": False, "default": None} for alias in aliases)]]
    return [list(entry.get("init", ()))]


def bind(name: str, overloads: list[Signature], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name. Raises TypeError as a binding does when no overload fits."""
    complaints = []
    for signature in overloads:
        positional = [parameter for parameter in signature if not parameter.get("kw_only")]
        known = {parameter["name"] for parameter in signature}
        given = dict(zip((parameter["name"] for parameter in positional), args, strict=False))
        if len(args) > len(positional):
            complaints.append(f"{len(args)} positional arguments, {len(positional)} are taken")
        elif unknown := kwargs.keys() - known:
            complaints.append(f"unexpected keyword {sorted(unknown)[0]!r}")
        elif twice := kwargs.keys() & given.keys():
            complaints.append(f"{sorted(twice)[0]!r} is given twice")
        elif missing := [p["name"] for p in signature if p.get("required") and p["name"] not in given.keys() | kwargs.keys()]:
            complaints.append(f"{missing[0]!r} is missing")
        else:
            defaults = {p["name"]: p.get("default") for p in signature if not p.get("required")}
            return {**{key: None if isinstance(value, dict) else value for key, value in defaults.items()}, **given, **kwargs}
    raise TypeError(f"{name}: incompatible arguments: {'; '.join(complaints)}")


class _Strict:
    """Base of every class made here: nothing but the contract's attributes can be read or set."""

    _name = ""
    _entry: dict[str, Any] = {}  # noqa: RUF012 - set once by make_class

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            values = bind(self._name, signatures(self._entry), args, kwargs)
        except TypeError as error:
            # pydantic's ValidationError is a ValueError.
            fields = PYTHON.get(self._entry.get("init_fields_from", ""), self._entry)
            raise (ValueError(str(error)) if fields.get("extra_fields") == "forbid" else error) from None
        self.__dict__.update(values)
        self.prepare()

    def prepare(self) -> None:
        """What a class with behaviour does after its arguments were taken."""

    def __getattr__(self, name: str) -> Any:
        if name in self._entry.get("attributes", ()):
            return None
        raise AttributeError(f"{self._name} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            self.__dict__[name] = value
            return
        entry = self._entry
        if name in entry.get("read_only", ()) or name not in (*entry.get("attributes", ()), *(f["name"] for f in entry.get("fields", ()))):
            raise AttributeError(f"{self._name}.{name} cannot be set")
        self.__dict__[name] = value

    def _set(self, **values: Any) -> None:
        """For the fake itself: fill in what a caller could only read."""
        for name in values:
            assert name in self._entry["attributes"], f"the fake invents {self._name}.{name}"
        self.__dict__.update(values)


def make_enum(path: str) -> type[enum.Enum]:
    name = path.rpartition(".")[2]
    return enum.Enum(name, {member: member for member in PYTHON[path]["members"]})  # type: ignore[return-value]


def make_class(path: str, base: type = _Strict) -> type:
    entry = PYTHON[path]
    body: dict[str, Any] = {"_name": path.rpartition(".")[2], "_entry": entry}
    for factory in entry.get("static_factories", ()):
        body[factory] = staticmethod(lambda factory=factory: factory)
    return type(body["_name"], (base,), body)


def checked(path: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method's call, by name."""
    entry = PYTHON[path]
    overloads = entry.get("method_overloads", {}).get(method) or [entry["methods"][method]]
    return bind(f"{entry.get('kind')} {path}.{method}", overloads, args, kwargs)


def make(path: str) -> type:
    return make_enum(path) if PYTHON[path]["kind"] == "enum" else make_class(path)


def blank(made: type, **values: Any) -> Any:
    """An object that only TensorRT-LLM itself makes, such as a Result."""
    found = made.__new__(made)
    found._set(**values)
    return found
