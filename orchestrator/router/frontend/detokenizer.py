"""The detokenizer: from the token ids of a request's choices to text, and the stop strings in it.

Owns, per choice, the bytes of an unfinished character and the text that may still become a stop string. It never sends half a character or
a part of a stop string, never blocks the event loop, and knows nothing of HTTP or ZeroMQ.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import msgspec

from orchestrator.router.frontend.tokenizer import TokenTable
from orchestrator.router.metrics import RequestMeter
from workers.protocol.errors import TriremeError
from workers.protocol.messages import FinishReason, Logprobs, Usage


class TextRule(msgspec.Struct, frozen=True, kw_only=True):
    """How token ids become the text of a choice. ``markers``: special tokens that are shown even where others are not. ``json``: the output
    is one JSON value, so a choice that was cut at its length has stopped by itself if the value is whole."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    markers: tuple[str, ...] = ()
    min_tokens: int = 0
    json: bool = False


class TextSink(Protocol):
    """Receives the output of a request as text. For each choice: on_text any number of times, then exactly one of on_end and on_failed."""

    def on_text(self, choice: int, first: int, tokens: list[int], text: str, logprobs: list[Logprobs] | None) -> None:
        """``tokens`` at the output positions from ``first`` on, and the text that can be shown now: mostly the text of these tokens, but
        sometimes none, or text of earlier tokens too."""

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None: ...

    def on_end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None:
        """The choice has ended. ``tail``: text that waited until now. ``stopped_by``: the stop string or stop token id that ended it."""

    def on_failed(self, choice: int, error: TriremeError) -> None: ...


class StopStrings:
    """The stop strings of one request, prepared once. Immutable."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self._longest = max(map(len, stops), default=0) - 1
        self._prefixes = frozenset(stop[:length] for stop in stops for length in range(1, len(stop)))
        self._last = frozenset(prefix[-1] for prefix in self._prefixes)

    def find(self, text: str) -> tuple[int, int, str] | None:
        """(start, end, stop string) of the match that ends first, or None."""
        found = None
        for stop in self.stops:
            start = text.find(stop)
            if start >= 0 and (found is None or start + len(stop) < found[1]):
                found = (start, start + len(stop), stop)
        return found

    def partial(self, text: str) -> int:
        """How many characters at the end of ``text`` may still become a stop string: the length of the longest suffix that begins one."""
        if not text or text[-1] not in self._last:
            return 0
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                return length
        return 0


_Utf8 = cast("type[codecs.BufferedIncrementalDecoder]", codecs.getincrementaldecoder("utf-8"))


class _ChoiceText:
    """Decoding state of one choice. ``count``: output tokens so far. ``cached``: prompt tokens found in the prefix cache. ``pending``: text
    that may still become a stop string. ``shown``: all text that was sent, kept only for JSON."""

    __slots__ = ("cached", "count", "decode", "decoder", "ended", "pending", "shown")

    def __init__(self) -> None:
        self.decoder = _Utf8("replace")
        self.decode = self.decoder.decode
        self.count = self.cached = 0
        self.pending = ""
        self.ended = False
        self.shown: list[str] = []


class Detokenizer:
    """A :class:`~orchestrator.router.interfaces.Watcher` that turns token ids into text for ``sink``.

    ``stop_choice(choice)`` tells the dispatcher that a stop string has ended a choice; then the replica reports no usage, so
    ``prompt_tokens`` is needed for it. ``emitted``: ids that the client has already received, per choice (a journal). Decoding continues
    after them; a choice that already has its stop string is ended by :meth:`end_stopped`.
    """

    def __init__(
        self,
        table: TokenTable,
        rule: TextRule,
        sink: TextSink,
        *,
        stop_choice: Callable[[int], None],
        choices: int,
        prompt_tokens: int,
        meter: RequestMeter,
        emitted: Sequence[Sequence[int]] = (),
    ) -> None:
        self._table = table
        self._bytes = table.showing(rule.markers) if rule.skip_special else table.all
        self._rule, self._sink, self._stop_choice, self._meter = rule, sink, stop_choice, meter
        self._stops = StopStrings(rule.stops) if rule.stops else None
        #: All text is passed on at once, without a search for stop strings.
        self._plain = self._stops is None and not rule.json
        self.prompt_tokens = prompt_tokens
        self._choices = [_ChoiceText() for _ in range(choices)]
        self._stopped = [self._read(text, list(ids))[2] for text, ids in zip(self._choices, emitted, strict=False)]

    @property
    def output_tokens(self) -> int:
        """Output tokens of all choices so far."""
        return sum(state.count for state in self._choices)

    def end_stopped(self) -> None:
        """End the choices whose journal already has its stop string. Call it once, after the request was submitted."""
        for choice, stop in enumerate(self._stopped):
            if stop is not None:
                self._stop(choice, stop)

    def on_tokens(self, choice: int, first: int, tokens: list[int], logprobs: list[Logprobs] | None) -> None:
        state = self._choices[choice]
        if state.ended:
            return
        if self._plain:
            raw = self._table.pick(self._bytes, tokens)
            # Most tokens are whole characters of one byte: these need no decoder, unless it holds the begin of a character.
            text = raw.decode() if raw.isascii() and not state.decoder.buffer else state.decode(raw)
            state.count = first + len(tokens)
            self._sink.on_text(choice, first, tokens, text, logprobs)
            return
        state.count = first
        text, used, stop = self._read(state, tokens)
        if used < len(tokens):
            tokens, logprobs = tokens[:used], logprobs and logprobs[:used]
        self._sink.on_text(choice, first, tokens, text, logprobs)
        if stop is not None:
            self._stop(choice, stop)

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None:
        self._sink.on_prompt(choice, logprobs)

    def on_cached(self, choice: int, tokens: int) -> None:
        self._choices[choice].cached = tokens

    def on_done(self, choice: int, reason: FinishReason, usage: Usage, stop_id: int | None) -> None:
        state = self._choices[choice]
        if state.ended:
            return
        state.ended = True
        tail = state.pending + state.decode(b"", True)
        if self._rule.json and reason == "length" and _is_whole_json("".join(state.shown) + tail):
            reason = "stop"
        self._end(choice, reason, usage, stop_id, tail)

    def on_failed(self, choice: int, error: TriremeError) -> None:
        state = self._choices[choice]
        if state.ended:
            return
        state.ended = True
        self._meter.failed(error.code)
        self._sink.on_failed(choice, error)

    def _stop(self, choice: int, stop: str) -> None:
        state = self._choices[choice]
        state.ended = True
        self._stop_choice(choice)
        usage = Usage(prompt_tokens=self.prompt_tokens, output_tokens=state.count, cached_tokens=state.cached)
        self._end(choice, "stop", usage, stop, "")

    def _end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None:
        self._meter.ended(reason, usage)
        self._sink.on_end(choice, reason, usage, stopped_by, tail)

    def _read(self, state: _ChoiceText, tokens: list[int]) -> tuple[str, int, str | None]:
        """(text to show now, tokens used, stop string that was found)."""
        stop = None
        used = len(tokens)
        if self._stops is None:
            text = state.decode(self._table.pick(self._bytes, tokens))
        else:
            text, used, stop = self._read_to_stop(state, tokens, self._stops)
        state.count += used
        if self._rule.json:
            state.shown.append(text)
        return text, used, stop

    def _read_to_stop(self, state: _ChoiceText, tokens: list[int], stops: StopStrings) -> tuple[str, int, str | None]:
        shown = []
        for index, token in enumerate(tokens, 1):
            pending = state.pending + state.decode(self._table.pick(self._bytes, (token,)))
            # Below min_tokens a stop string is text like any other, as in vLLM.
            found = stops.find(pending) if state.count + index > self._rule.min_tokens else None
            if found is not None:
                start, end, stop = found
                state.pending = ""
                shown.append(pending[: end if self._rule.include_stop else start])
                return "".join(shown), index, stop
            safe = len(pending) - stops.partial(pending)
            shown.append(pending[:safe])
            state.pending = pending[safe:]
        return "".join(shown), len(tokens), None


def _is_whole_json(text: str) -> bool:
    """Whether ``text`` is JSON to which no token could have been added. A number could have had more digits."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return isinstance(found, bool) or not isinstance(found, int | float)
