"""The served models' text side: tokenizer, chat template, and the pools that work for them.

Owns one tokenizer per model, the small pool that encodes long prompts, and the sandbox pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from orchestrator.config.router_spec import ModelCard
from orchestrator.router.frontend.sandbox_pool import SandboxPool
from orchestrator.router.frontend.tokenizer import Loaded, load

#: Prompts up to this many characters are encoded on the loop: a hand-over to the pool costs more than they do.
INLINE_CHARS = 1024

T = TypeVar("T")


class TextModel:
    """A served model's text side: its card, tokenizer, chat template (None = it has none) and end-of-sequence ids. Immutable."""

    def __init__(self, card: ModelCard, loaded: Loaded) -> None:
        self.card, self.name, self.table = card, card.name, loaded.table
        self.template, self.eos_ids = loaded.template, loaded.eos_ids
        self.names = (card.name, *card.aliases)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self.table.join(ids, skip_special).decode("utf-8", "replace")


class TextModels:
    """All served models by name and alias, the encoding pool, and the cells that render; ``close`` ends both."""

    def __init__(self, models: Iterable[TextModel], *, threads: int = 2) -> None:
        self.models = tuple(models)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self.cells = SandboxPool({model.name: model.template for model in self.models if model.template is not None})
        self._by_name = {name: model for model in self.models for name in model.names}

    def get(self, name: str) -> TextModel | None:
        return self._by_name.get(name)

    async def run(self, size: int, work: Callable[[], T], *, inline: int = INLINE_CHARS) -> T:
        """``work()``, in the pool if its ``size`` is above ``inline``."""
        if size <= inline:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.cells.close()


def load_texts(cards: Iterable[ModelCard]) -> TextModels:
    """Read every model's tokenizer folder. Raises ArtifactError naming the file."""
    return TextModels(TextModel(card, load(card.tokenizer)) for card in cards)
