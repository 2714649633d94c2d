"""HTTP dialects: what a family of clients sends and expects back (OpenAI; KServe and Triton). One module or package each, in one table."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.router.http.dialect import Dialect, HttpFrontend
from orchestrator.router.http.dialects.kserve.api import KServeDialect
from orchestrator.router.http.dialects.openai.api import OpenAiDialect

#: The first is the default: it words the errors of the paths that are below no other dialect's prefix.
DIALECTS: tuple[Callable[[HttpFrontend], Dialect], ...] = (OpenAiDialect, KServeDialect)
