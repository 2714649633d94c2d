"""Text on both sides of the ids: encoding prompts, decoding streams, stop strings.

Owns one tokenizer per model, the small pool that encodes long prompts, and per choice the bytes of an unfinished character and the text
that may yet become a stop string. Must never send half a character or part of a stop string, never block the event loop, and know
nothing of HTTP or ZeroMQ.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

import msgspec

from orchestrator.router.frontend.text_models import TextModel
from orchestrator.router.interfaces import Ticket
from orchestrator.router.metrics import RequestMeter
from workers.protocol.errors import TriremeError
from workers.protocol.messages import FinishReason, Logprobs, Usage


class TextRule(msgspec.Struct, frozen=True, kw_only=True):
    """How ids become a choice's text. ``json``: the output is one JSON value, so once whole it has ended, whatever cut it."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    min_tokens: int = 0
    json: bool = False


class TextSink(Protocol):
    """What a door gets of a request: per choice on_text*, then exactly one of on_end and on_failed."""

    def on_text(self, choice: int, first: int, tokens: list[int], text: str, logprobs: list[Logprobs] | None) -> None:
        """Tokens at output positions ``first``.., and the text now safe to show (often theirs, sometimes none or more)."""

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None: ...

    def on_end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None:
        """The choice is over; ``tail`` is text that was held back. ``stopped_by``: the stop string or stop token id, if one ended it."""

    def on_failed(self, choice: int, error: TriremeError) -> None: ...


class StopStrings:
    """The stop strings of one request, prepared once; immutable."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self._longest = max(map(len, stops), default=0) - 1
        self._prefixes = frozenset(stop[:length] for stop in stops for length in range(1, len(stop)))
        self._last = frozenset(prefix[-1] for prefix in self._prefixes)

    def find(self, text: str) -> tuple[int, int, str] | None:
        """(start, end, stop string) of the match that is whole first, reading left to right."""
        found = None
        for stop in self.stops:
            start = text.find(stop)
            if start >= 0 and (found is None or start + len(stop) < found[1]):
                found = (start, start + len(stop), stop)
        return found

    def held(self, text: str) -> int:
        """How many characters at the end of ``text`` may yet become a stop string: the longest suffix that begins one."""
        if not text or text[-1] not in self._last:
            return 0
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                return length
        return 0


class _ChoiceText:
    """Decoding state of one choice."""

    __slots__ = ("count", "decode", "ended", "held", "shown")

    def __init__(self) -> None:
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.count = 0
        self.held = ""
        self.ended = False
        self.shown: list[str] = []


class Detokenizer:
    """A :class:`~orchestrator.router.interfaces.Watcher` that turns ids into text for a door.

    Make it, submit it, then :meth:`bind` the ticket. ``emitted``: ids that the client already holds, per choice (a journal): decoding goes
    on after them, and a choice that has its stop string already ends at once. ``prompt_tokens`` is for the usage of a choice that a stop
    string ends, which the replica never gets to report.
    """

    def __init__(
        self,
        model: TextModel,
        rule: TextRule,
        sink: TextSink,
        *,
        choices: int,
        prompt_tokens: int,
        meter: RequestMeter,
        emitted: Sequence[Sequence[int]] = (),
    ) -> None:
        self._table = model.table
        self._bytes = model.table.visible if rule.skip_special else model.table.all
        self._rule, self._sink, self._meter = rule, sink, meter
        self._stops = StopStrings(rule.stops) if rule.stops else None
        self._prompt_tokens = prompt_tokens
        self._ticket: Ticket | None = None
        self._rows = [_ChoiceText() for _ in range(choices)]
        self._stopped = [self._read(row, list(ids))[2] for row, ids in zip(self._rows, emitted, strict=False)]

    def bind(self, ticket: Ticket) -> None:
        self._ticket = ticket
        for choice, stop in enumerate(self._stopped):
            if stop is not None:
                self._stop(choice, stop)

    def on_tokens(self, choice: int, first: int, tokens: list[int], logprobs: list[Logprobs] | None) -> None:
        row = self._rows[choice]
        if row.ended:
            return
        row.count = first
        text, used, stop = self._read(row, tokens)
        if used < len(tokens):
            tokens, logprobs = tokens[:used], logprobs and logprobs[:used]
        self._sink.on_text(choice, first, tokens, text, logprobs)
        if stop is not None:
            self._stop(choice, stop)

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None:
        self._sink.on_prompt(choice, logprobs)

    def on_done(self, choice: int, reason: FinishReason, usage: Usage, stop_id: int | None) -> None:
        row = self._rows[choice]
        if row.ended:
            return
        row.ended = True
        tail = row.held + row.decode(b"", True)
        if self._rule.json and reason == "length" and _is_json("".join(row.shown) + tail):
            reason = "stop"
        self._end(choice, reason, usage, stop_id, tail)

    def on_failed(self, choice: int, error: TriremeError) -> None:
        row = self._rows[choice]
        if row.ended:
            return
        row.ended = True
        self._meter.failed(error.code)
        self._sink.on_failed(choice, error)

    def _stop(self, choice: int, stop: str) -> None:
        row = self._rows[choice]
        row.ended = True
        if self._ticket is not None:
            self._ticket.finish(choice)
        self._end(choice, "stop", Usage(prompt_tokens=self._prompt_tokens, output_tokens=row.count), stop, "")

    def _end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None:
        self._meter.ended(reason, usage)
        self._sink.on_end(choice, reason, usage, stopped_by, tail)

    def _read(self, row: _ChoiceText, tokens: list[int]) -> tuple[str, int, str | None]:
        """(text now safe, tokens used, stop string that matched)."""
        stop = None
        used = len(tokens)
        if self._stops is None:
            text = row.decode(self._table.pick(self._bytes, tokens))
        else:
            text, used, stop = self._read_to_stop(row, tokens, self._stops)
        row.count += used
        if self._rule.json:
            row.shown.append(text)
        return text, used, stop

    def _read_to_stop(self, row: _ChoiceText, tokens: list[int], stops: StopStrings) -> tuple[str, int, str | None]:
        shown = []
        for index, token in enumerate(tokens, 1):
            pending = row.held + row.decode(self._table.pick(self._bytes, (token,)))
            # Below min_tokens a stop string is text like any other, as in vLLM.
            found = stops.find(pending) if row.count + index > self._rule.min_tokens else None
            if found is not None:
                start, end, stop = found
                row.held = ""
                shown.append(pending[: end if self._rule.include_stop else start])
                return "".join(shown), index, stop
            safe = len(pending) - stops.held(pending)
            shown.append(pending[:safe])
            row.held = pending[safe:]
        return "".join(shown), len(tokens), None


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
