"""Options of a command as structs: several commands can share them, and a command takes one parameter instead of ten."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import msgspec

KEYWORD = inspect.Parameter.KEYWORD_ONLY


def with_option_structs(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer needs it: in place of each parameter that is a struct, one parameter for each field of the struct.

    A field declares its flag like a parameter, in ``Annotated[type, typer.Option(...)]``. The flags keep the order of the fields.
    """
    parameters: list[inspect.Parameter] = []
    structs: dict[str, type[msgspec.Struct]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            structs[parameter.name] = kind
            hints = get_type_hints(kind, include_extras=True)
            for field in msgspec.structs.fields(kind):
                parameters.append(inspect.Parameter(field.name, KEYWORD, default=field.default, annotation=hints[field.name]))
        else:
            parameters.append(parameter.replace(kind=KEYWORD))

    def expanded(**values: Any) -> None:
        for name, struct in structs.items():
            values[name] = struct(**{field: values.pop(field) for field in struct.__struct_fields__})
        command(**values)

    functools.update_wrapper(expanded, command, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded
