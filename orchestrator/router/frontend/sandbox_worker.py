"""A sandbox worker: a process that renders chat templates and compiles grammars for a router. It may be killed at any moment.

Owns the code that a model's template or a request's grammar can keep busy. The kernel bounds its memory, the renderer bounds its output,
and :mod:`orchestrator.router.frontend.sandbox_pool` bounds its time, with SIGKILL. It reads typed msgpack frames from the socket that is
its standard input: a :class:`SandboxSetup`, then one job at a time, each with one answer. It opens no files and prints nothing of a
request.
"""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

import msgspec

from orchestrator.router.frontend.chat_template import ChatTemplate, PromptPiece, TemplateSource
from workers.process import die_with_parent
from workers.protocol.errors import ArtifactError, Rejected
from workers.protocol.messages import GuideSpec

#: Address space of the process, bytes. A job that needs more gets a MemoryError, which fails its request.
MAX_MEMORY = 1 << 30
HEADER_BYTES = 4


class SandboxSetup(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame. ``templates``: by model name. A template that cannot be compiled is answered with :class:`JobRefused`."""

    templates: dict[str, TemplateSource]


class RenderJob(msgspec.Struct, frozen=True, kw_only=True, tag="render"):
    """Arguments as of :meth:`~orchestrator.router.frontend.chat_template.ChatTemplate.render`."""

    model: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    reasoning_effort: str | None = None
    kwargs: dict[str, Any] | None = None

    def render(self, template: ChatTemplate) -> list[PromptPiece]:
        """The job done. Raises Rejected, also where the template fails."""
        try:
            return template.render(
                self.messages,
                tools=self.tools,
                documents=self.documents,
                add_generation_prompt=self.add_generation_prompt,
                continue_final_message=self.continue_final_message,
                reasoning_effort=self.reasoning_effort,
                kwargs=self.kwargs,
            )
        except Rejected:
            raise
        except Exception as error:
            # The edge of a job: an error fails this job only. The error's text may hold text of the request, so only its type is told.
            raise Rejected(f"the request cannot be rendered: {type(error).__name__}", param="messages") from None


class GrammarJob(msgspec.Struct, frozen=True, kw_only=True, tag="try"):
    """Compile this grammar, to see whether it can be compiled."""

    guide: GuideSpec


class Rendered(msgspec.Struct, frozen=True, kw_only=True, tag="rendered"):
    pieces: list[PromptPiece]


class JobDone(msgspec.Struct, frozen=True, kw_only=True, tag="sound"):
    """The setup is done, or the grammar compiles."""


class JobRefused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The fields of a :class:`~workers.protocol.errors.Rejected`; of an ArtifactError, where the setup is refused."""

    what: str
    why: str = ""
    hint: str = ""
    code: str = "invalid_request"
    param: str | None = None


Job = RenderJob | GrammarJob
Answer = Rendered | JobDone | JobRefused


class SandboxWorker:
    """The work of the process, without the process. Raises ArtifactError for a template that cannot be compiled."""

    def __init__(self, setup: SandboxSetup) -> None:
        self._templates: dict[str, ChatTemplate] = {model: source.compile() for model, source in setup.templates.items()}

    def answer(self, job: Job) -> Answer:
        try:
            return Rendered(pieces=job.render(self._templates[job.model])) if isinstance(job, RenderJob) else _compile(job.guide)
        except Rejected as error:
            # The field of a grammar is not known here: a request can give it in one of several fields.
            return JobRefused(what=error.what, why=error.why, code=error.code, param=error.param if isinstance(job, RenderJob) else None)
        except Exception as error:
            # The edge of a job: an error fails this job only. The error's text may hold text of the request, so only its type is sent.
            return JobRefused(what=f"the request cannot be rendered: {type(error).__name__}")


def _compile(guide: GuideSpec) -> Answer:
    try:
        from workers.sampling.llguidance_guide import check_grammar
    except ImportError:
        return JobDone()  # without llguidance on this host, the replica compiles the grammar first
    check_grammar(guide)
    return JobDone()


def _read(count: int) -> bytes:
    """``count`` bytes, or fewer where the router has closed the socket."""
    parts = []
    while count and (part := os.read(0, min(count, 1 << 20))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _receive() -> bytes:
    """The next frame; empty when the router has closed the socket."""
    return _read(int.from_bytes(_read(HEADER_BYTES), "little"))


def _send(answer: Answer) -> None:
    data = msgspec.msgpack.encode(answer)
    rest = memoryview(len(data).to_bytes(HEADER_BYTES, "little") + data)
    while rest:
        rest = rest[os.write(0, rest) :]


def main() -> None:
    die_with_parent()
    # The router obeys a signal to the whole process group; it may need this process until it has drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    jobs = msgspec.msgpack.Decoder(Job)
    try:
        try:
            worker = SandboxWorker(msgspec.msgpack.decode(_receive(), type=SandboxSetup))
        except ArtifactError as error:
            return _send(JobRefused(what=error.what, why=error.why, hint=error.hint))
        _send(JobDone())
        while frame := _receive():
            _send(worker.answer(jobs.decode(frame)))
    except (BrokenPipeError, ConnectionResetError):
        return  # the router is gone


if __name__ == "__main__":
    main()
