"""A cell: a process that renders chat templates and tries grammars out for a router, and that may be killed at any moment.

Owns the code that a model's template or a request's grammar can keep busy, with bounds on memory and output that the kernel and the
renderer keep; the bound on time is kept by :mod:`orchestrator.router.frontend.sandbox_pool`, with SIGKILL. Typed msgpack frames over the
socket that is its standard input: a :class:`SandboxSetup`, then one job, one answer. Must never open a file of its own, nor print what a
request holds.
"""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

import jinja2
import msgspec

from orchestrator.router.frontend.chat_messages import Message, Tool
from orchestrator.router.frontend.chat_template import ChatTemplate, PromptPiece, TemplateSource
from workers.process import die_with_parent
from workers.protocol.errors import Rejected
from workers.protocol.messages import GuideSpec

#: Address space of a cell. What asks for more gets a MemoryError, which ends its request.
MAX_MEMORY = 1 << 30
HEADER_BYTES = 4


class SandboxSetup(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame. ``templates``: by model name."""

    templates: dict[str, TemplateSource]


class RenderJob(msgspec.Struct, frozen=True, kw_only=True, tag="render"):
    """Arguments as of :meth:`~orchestrator.router.frontend.chat_template.ChatTemplate.render`."""

    model: str
    messages: list[Message]
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    kwargs: dict[str, Any] | None = None


class GrammarJob(msgspec.Struct, frozen=True, kw_only=True, tag="try"):
    """Can this grammar be compiled?"""

    guide: GuideSpec


class Rendered(msgspec.Struct, frozen=True, kw_only=True, tag="rendered"):
    pieces: list[PromptPiece]


class JobDone(msgspec.Struct, frozen=True, kw_only=True, tag="sound"):
    """The setup is done, or the grammar compiles."""


class JobRefused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The fields of a :class:`~workers.protocol.errors.Rejected`."""

    what: str
    why: str = ""
    code: str = "invalid_request"
    param: str | None = None


Job = RenderJob | GrammarJob
Answer = Rendered | JobDone | JobRefused


class SandboxWorker:
    """What the process does, without the process. A template that does not compile fails its own requests, not the router."""

    def __init__(self, setup: SandboxSetup) -> None:
        self._templates: dict[str, ChatTemplate | JobRefused] = {}
        for model, source in setup.templates.items():
            try:
                self._templates[model] = source.compile()
            except (jinja2.TemplateError, ValueError, RecursionError, MemoryError) as error:
                why = f"{type(error).__name__}: {str(error)[:200]}"
                self._templates[model] = JobRefused(
                    what="messages: the model's chat template cannot be compiled", why=why, param="messages"
                )

    def answer(self, job: Job) -> Answer:
        try:
            return self._render(job) if isinstance(job, RenderJob) else _try(job.guide)
        except Rejected as error:
            # A grammar has no field of its own: its request spelled it in one of several.
            return JobRefused(what=error.what, why=error.why, code=error.code, param=error.param if isinstance(job, RenderJob) else None)
        except Exception as error:
            # The edge of a job: whatever it did ends it only. Its text may be in the error's, so only the kind is told.
            return JobRefused(what=f"the request cannot be rendered: {type(error).__name__}")

    def _render(self, job: RenderJob) -> Answer:
        template = self._templates[job.model]
        if isinstance(template, JobRefused):
            return template
        pieces = template.render(job.messages, tools=job.tools, add_generation_prompt=job.add_generation_prompt, kwargs=job.kwargs)
        return Rendered(pieces=pieces)


def _try(guide: GuideSpec) -> Answer:
    try:
        from workers.sampling.llguidance_guide import check_grammar
    except ImportError:
        return JobDone()  # without llguidance on this host, the replica is the first to compile
    check_grammar(guide)
    return JobDone()


def _read(count: int) -> bytes:
    """``count`` bytes, or fewer where the router has closed."""
    parts = []
    while count and (part := os.read(0, min(count, 1 << 20))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _receive() -> bytes:
    """The next frame; empty when there is none any more."""
    return _read(int.from_bytes(_read(HEADER_BYTES), "little"))


def _send(answer: Answer) -> None:
    data = msgspec.msgpack.encode(answer)
    rest = memoryview(len(data).to_bytes(HEADER_BYTES, "little") + data)
    while rest:
        rest = rest[os.write(0, rest) :]


def main() -> None:
    die_with_parent()
    # A signal to the whole group is the router's to obey: it may still need this process for what it finishes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    jobs = msgspec.msgpack.Decoder(Job)
    try:
        cell = SandboxWorker(msgspec.msgpack.decode(_receive(), type=SandboxSetup))
        _send(JobDone())
        while frame := _receive():
            _send(cell.answer(jobs.decode(frame)))
    except (BrokenPipeError, ConnectionResetError):
        return  # the router is gone


if __name__ == "__main__":
    main()
