"""The results for a caller: pieces while they arrive, and the whole answer at the end. Plain values."""

from __future__ import annotations

import msgspec

from workers.protocol.messages import FinishReason, Logprobs, Usage


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """New output of one choice: ``tokens`` at output positions ``first``.. and ``text`` that may be shown. ``finish_reason`` comes with the
    choice's last piece."""

    choice: int
    first: int
    tokens: list[int]
    text: str = ""
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One whole answer. ``stop_id``: the stop token that ended it, which is not among ``tokens``."""

    index: int
    text: str
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage
    stop_id: int | None = None
    logprobs: list[Logprobs] | None = None


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """All choices of a request. ``attempts``: number of further routers after the first."""

    request: str
    seed: int
    prompt_tokens: int
    choices: list[Choice]
    prompt_logprobs: list[Logprobs] | None = None
    attempts: int = 0

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def tokens(self) -> list[int]:
        """The first choice's ids."""
        return self.choices[0].tokens
