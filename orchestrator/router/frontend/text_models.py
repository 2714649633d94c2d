"""The text side of the served models: tokenizers, chat templates, tool parsers, and the pools that work for them.

Owns one tokenizer per model, the threads that encode long prompts, the chat templates that are rendered in this process, and the sandbox
pool that renders the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from orchestrator.config.router_spec import ModelCard
from orchestrator.router import request_context
from orchestrator.router.frontend.chat_template import PromptPiece
from orchestrator.router.frontend.fair_turns import FairTurns
from orchestrator.router.frontend.sampling_defaults import SamplingDefaults, read_defaults
from orchestrator.router.frontend.sandbox_pool import SandboxPool
from orchestrator.router.frontend.sandbox_worker import RenderJob
from orchestrator.router.frontend.tokenizer import Loaded, load
from orchestrator.router.frontend.tool_parsers import TOOL_PARSERS, ToolParser

#: Prompts up to this many characters are encoded on the event loop: handing them to the pool costs more than encoding them.
INLINE_CHARS = 1024
#: Bytes and messages of a job up to which a bounded template is rendered on the event loop, and the longest argument for the template,
#: characters. It takes 0.1 to 1 ms, and 2.5 ms where all is control tokens or empty parts.
SMALL_BYTES, SMALL_MESSAGES, MAX_PLAIN = 12 << 10, 64, 64
#: The tool parser of every model.
TOOL_PARSER = "hermes"

T = TypeVar("T")


class TextModel:
    """The text side of one served model: card, tokenizer, chat template (None = it has none), end-of-sequence ids, defaults of requests,
    tool parser. Immutable. Raises ArtifactError for a default that no request could have."""

    def __init__(self, card: ModelCard, loaded: Loaded, tool_parser: type[ToolParser] = TOOL_PARSERS[TOOL_PARSER]) -> None:
        self.card, self.name, self.table = card, card.name, loaded.table
        self.template, self.eos_ids = loaded.template, loaded.eos_ids
        self.defaults = read_defaults(loaded.generation, card.tokenizer) if card.generation_config == "auto" else SamplingDefaults()
        self.names = (card.name, *card.aliases)
        self.tool_parser = tool_parser

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self.table.join(ids, skip_special).decode("utf-8", "replace")


class TextModels:
    """All served models by name and alias, with the threads and the sandbox pool that they share; :meth:`close` ends both."""

    def __init__(self, models: Iterable[TextModel], *, threads: int = 2) -> None:
        self.models = tuple(models)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._turns = FairTurns(threads)
        templates = {model.name: model.template for model in self.models if model.template is not None}
        self.sandbox = SandboxPool(templates)
        #: The templates that may be rendered in this process.
        self._bounded = {name: found for name, source in templates.items() if (found := source.compile_bounded()) is not None}
        self._by_name = {name: model for model in self.models for name in model.names}

    def get(self, name: str) -> TextModel | None:
        return self._by_name.get(name)

    async def render(self, job: RenderJob) -> list[PromptPiece]:
        """The prompt as pieces: in this process where that is known to be quick, else in the sandbox. Raises Rejected, Overloaded and
        Unavailable."""
        template = self._bounded.get(job.model)
        if template is None or not _is_small(job):
            return await self.sandbox.render(job)
        return job.render(template)

    async def run(self, size: int, work: Callable[[], T], *, inline: int = INLINE_CHARS) -> T:
        """``work()``, in the pool if its ``size`` is above ``inline``. Callers share the pool fairly."""
        if size <= inline:
            return work()
        async with self._turns.turn(request_context.caller()):
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.sandbox.close()


def _is_small(job: RenderJob) -> bool:
    if len(job.messages) > SMALL_MESSAGES or not all(_is_plain(value) for value in (job.kwargs or {}).values()):
        return False
    try:
        return len(msgspec.msgpack.encode(job)) <= SMALL_BYTES
    except (OverflowError, ValueError):
        return False  # the sandbox pool says why


def _is_plain(value: object) -> bool:
    """An argument of a template that is no work for it."""
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= MAX_PLAIN)


def load_texts(cards: Iterable[ModelCard]) -> TextModels:
    """Read every model's tokenizer folder. Raises ArtifactError with the file's name."""
    return TextModels(TextModel(card, load(card.tokenizer, card.chat_template)) for card in cards)
