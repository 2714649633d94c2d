"""The history of the last requests, for ``trireme debug story``.

Owns the stories of requests that have ended, bounded by number and bytes; the oldest are dropped first. A story holds ids, counts and
times; never a prompt, a token or a text.
"""

from __future__ import annotations

from collections import deque

import msgspec

from orchestrator.router.core.stats import Attempt

#: Ended requests whose stories are kept, and the bytes that they may take.
KEPT_REQUESTS, KEPT_BYTES = 10_000, 16 << 20


class ChoiceStory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One choice of a request. ``end``: ``finished``, ``failed`` or ``cancelled``, empty while it lives; ``detail``: why. ``ended_at`` 0 =
    it lives. ``attempts`` are in order; ``dropped_attempts`` of them, after the first, are no longer kept."""

    phase: str
    output_tokens: int
    attempts: list[Attempt] = []
    dropped_attempts: int = 0
    end: str = ""
    detail: str = ""
    ended_at: float = 0.0


class RequestStory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What happened to one request. Times are the core's, seconds. ``number``: the request's id in the core. ``caller_id``: the
    ``x-request-id`` of the HTTP request that it came with, empty where it is ``request_id``. ``client_attempt``: how often the client had
    gone to another router before."""

    request_id: str
    number: int
    model: str
    arrived_at: float
    prompt_tokens: int
    max_tokens: int
    choices: list[ChoiceStory]
    caller_id: str = ""
    client_attempt: int = 0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(RequestStory)


class RequestHistory:
    """The stories of ended requests. They are kept encoded: smaller, and no work for the garbage collector."""

    def __init__(self) -> None:
        self._stories: deque[tuple[str, str, bytes]] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._stories)

    def add(self, story: RequestStory) -> None:
        encoded = _encoder.encode(story)
        self._stories.append((story.request_id, story.caller_id, encoded))
        self._bytes += len(encoded)
        while len(self._stories) > KEPT_REQUESTS or self._bytes > KEPT_BYTES:
            self._bytes -= len(self._stories.popleft()[2])

    def find(self, request_id: str) -> list[RequestStory]:
        """The stories of ended requests with this id, as their own or as their caller's, oldest first: a client may use an id again."""
        return [_decoder.decode(encoded) for known, caller_id, encoded in self._stories if request_id in (known, caller_id)]
