"""Defaults of requests from a model's ``generation_config.json``, as in vLLM: the file sets the parameters that a request does not set.

Owns the keys that are read and their limits, which are those of a request. The file's end-of-sequence ids are not defaults: they belong to
the tokenizer (:mod:`orchestrator.router.frontend.tokenizer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from orchestrator.router.frontend.schema import range_fault
from workers.protocol.errors import ArtifactError

#: Keys of the file and the fields of requests that they are defaults of, where the names differ.
_FIELDS = {"max_new_tokens": "max_tokens"}
_WHOLE = ("top_k", "max_tokens")


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """None = the API's own default. ``max_tokens`` counts for chats alone: a completion has a default of its own."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None


def read_defaults(generation: Mapping[str, Any], folder: str) -> SamplingDefaults:
    """The defaults in ``generation``, the object in ``generation_config.json`` of ``folder``. Other keys are not read. Raises ArtifactError
    for a value that no request could have."""
    found: dict[str, Any] = {}
    for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"):
        value, field = generation.get(key), _FIELDS.get(key, key)
        if value is None:
            continue
        kind, wanted = ("a whole number", int) if field in _WHOLE else ("a number", int | float)
        fault = range_fault(field, value) if isinstance(value, wanted) and not isinstance(value, bool) else f"must be {kind}"
        if fault is None and field == "max_tokens" and value < 1:
            fault = f"must be at least 1, got {value}"
        if fault is not None:
            raise ArtifactError(
                f"{folder}/generation_config.json: {key} {fault}", f"it is {str(value)[:40]}",
                "correct the file, or ignore it: --generation-config none (generation_config: none)",
            )  # fmt: skip
        found[field] = value
    return SamplingDefaults(**found)
