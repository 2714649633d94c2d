"""The text side of the served models: tokenizers, chat templates, tool parsers, and the pools that work for them.

Owns one tokenizer per model, the threads that encode long prompts, and the sandbox pool that renders chat templates.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from orchestrator.config.router_spec import ModelCard
from orchestrator.router import request_context
from orchestrator.router.frontend.fair_turns import FairTurns
from orchestrator.router.frontend.sampling_defaults import SamplingDefaults, read_defaults
from orchestrator.router.frontend.sandbox_pool import SandboxPool
from orchestrator.router.frontend.tokenizer import Loaded, load
from orchestrator.router.frontend.tool_parsers import TOOL_PARSERS, ToolParser

#: Prompts up to this many characters are encoded on the event loop: handing them to the pool costs more than encoding them.
INLINE_CHARS = 1024
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
        self.sandbox = SandboxPool({model.name: model.template for model in self.models if model.template is not None})
        self._by_name = {name: model for model in self.models for name in model.names}

    def get(self, name: str) -> TextModel | None:
        return self._by_name.get(name)

    async def run(self, size: int, work: Callable[[], T], *, inline: int = INLINE_CHARS) -> T:
        """``work()``, in the pool if its ``size`` is above ``inline``. Callers share the pool fairly."""
        if size <= inline:
            return work()
        async with self._turns.turn(request_context.caller()):
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.sandbox.close()


def load_texts(cards: Iterable[ModelCard]) -> TextModels:
    """Read every model's tokenizer folder. Raises ArtifactError with the file's name."""
    return TextModels(TextModel(card, load(card.tokenizer, card.chat_template)) for card in cards)
