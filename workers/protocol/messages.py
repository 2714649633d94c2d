"""Every message on a ZeroMQ socket: typed msgpack, ext types refused, sizes bounded.

Owns the vocabulary and the codec; no sockets, no state.

    router  → replica   Submit Attach Cancel Credit RouterHeartbeat Bye
    replica → router    Hello Accepted Heartbeat Tokens Done Failed Bye
    client  → router    Generate Cancel Credit Query
    router  → client    Accepted Tokens Done Failed Report

``boot`` is the sender's nonce, new at each process start: a changed nonce on a connection means that another process has taken the peer's
place after a silent reconnect, and a leader sends Hello again. ``stream`` is a handle that the sender of a request assigns, unique within
its boot: a router numbers its Submits to replicas, a client numbers its requests to a router. The permanent name of a request is (client,
request_id); ``attempt`` counts its placements, and messages with an older attempt are dropped.

One ZeroMQ message = one frame of payload (after the routing id where the socket adds one).
"""

from __future__ import annotations

import gc
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from workers.protocol.errors import Rejected
from workers.protocol.specs import Quant, ResumeClass, RouterAddress
from workers.protocol.status import Count, EngineStats, Milliseconds

#: Version of the messages between replicas, routers and clients. Raise it when a field is renamed, removed or changes its meaning. A new
#: field with a default needs no new version: the other side ignores fields that it does not know. A Hello of another version is refused.
PROTOCOL = 3
#: Largest frame that either side accepts, bytes (ZMQ_MAXMSGSIZE).
MAX_FRAME = 8 << 20
#: Bytes above which a frame is decoded without the garbage collector.
LARGE_FRAME = 256 << 10
#: High-water mark of every socket, messages.
HIGH_WATER = 10_000
#: Upper bounds, tokens, of the histogram of steps.
STEP_TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
#: A frame may have 8 MB, and a million small objects hold an event loop for seconds. Therefore: the longest error text that is sent, and
#: the longest text of one field that is accepted, characters.
MAX_ERROR_TEXT, MAX_TEXT = 2000, 16_384
#: Most streams in a message, choices of a journal, ids of a prompt, tokens of one stream, and alternatives of a token.
MAX_STREAMS, MAX_CHOICES, MAX_IDS, MAX_DELTA, MAX_TOP = 65_536, 128, 1 << 20, 4096, 4096
#: Most API keys whose use a heartbeat names, and the longest id of one, characters.
MAX_KEYS, MAX_KEY_ID = 256, 64
#: Longest prompt whose logprobs are sent, tokens.
MAX_SCORED = 65_536
#: Largest epoch that is accepted: more epochs are above it than a replica can ever be launched.
MAX_EPOCH = 2**62
#: Credit that means "do not count".
UNLIMITED = 2**31 - 1

TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=UNLIMITED)]
Text: TypeAlias = Annotated[str, Meta(max_length=MAX_TEXT)]
StreamNumbers: TypeAlias = Annotated[list[int], Meta(max_length=MAX_STREAMS)]
FinishReason = Literal["stop", "length", "cancelled"]
#: The generating endpoints of the API, by the last words of their paths.
ApiEndpoint = Literal["chat", "completions"]


class GuideSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A grammar that the output must follow. ``kind``: ``json`` = any JSON object, ``json_schema``, ``regex``, ``grammar`` (Lark)
    and ``choice`` (``text`` is then a JSON list of strings). ``whitespace``: a regular expression for the text between the tokens of JSON
    (empty = none); None = the engine's default."""

    kind: Literal["json", "json_schema", "regex", "grammar", "choice"]
    text: str = ""
    whitespace: str | None = None

    @property
    def noun(self) -> str:
        """What a user calls the text of this grammar, for errors."""
        return {"json": "JSON", "json_schema": "schema", "regex": "pattern", "grammar": "grammar", "choice": "list of choices"}[self.kind]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters and the conditions that end a sequence; already validated at the edge.

    ``temperature`` 0 = greedy. ``top_k`` 0 and ``top_p`` 1 = off. ``logprobs``: number of alternatives reported with each token, None = no
    logprobs, 0 = only the sampled token's; ``prompt_logprobs`` the same for prompt positions. ``max_tokens`` counts emitted tokens,
    including those of earlier attempts; 0 = the prompt is computed (and scored), and no token is emitted. ``allowed_token_ids``: the only
    ids that may be chosen, None = all. ``bad_words``: id sequences that the output may not contain. The router handles stop strings:
    engines see only ids.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: GuideSpec | None = None


class Logprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Natural-log probabilities at one position: the token's own, and the best alternatives in falling order.

    ``logprob`` is None only at prompt position 0, for which there is no prediction.
    """

    token: int
    logprob: float | None
    top_ids: Annotated[list[int], Meta(max_length=MAX_TOP)]
    top_logprobs: Annotated[list[float], Meta(max_length=MAX_TOP)]


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a replica, in tokens, sequences and blocks; they come from the engine and are not configured a second time."""

    block_size: int
    num_blocks: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    vocab_size: int
    tp: int
    pp: int
    guided: bool = True
    max_logprobs: int = 20
    engine: str = "portable"
    dtype: str = "fp32"
    quant: Quant = Quant()
    #: Whether sequences reuse blocks by content, so that a request with a known prefix costs less here.
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        sizes = (
            self.block_size, self.num_blocks, self.max_batch_size, self.max_num_tokens, self.max_seq_len, self.vocab_size, self.tp, self.pp,
        )  # fmt: skip
        if min(sizes) < 1 or max(sizes) > UNLIMITED:
            raise ValueError(f"a size is not between 1 and {UNLIMITED}")


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts of one sequence. ``cached_tokens``: prompt tokens found in the prefix cache at the last placement."""

    prompt_tokens: Count
    output_tokens: Count
    cached_tokens: Count = 0
    preemptions: Count = 0


# router → replica


class GenerateTask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="generate"):
    """Generate tokens after the prompt. ``params.seed`` is resolved. ``emitted``: tokens that the client already has; the sequence
    continues after them and never repeats one. ``credit``: number of tokens that may be sent before more credit is granted."""

    params: SamplingParams
    emitted: list[int] = []
    credit: int = UNLIMITED


#: The work for a prompt. Another kind of work is another member of this union; an engine refuses kinds that it does not support.
Task: TypeAlias = GenerateTask


class Submit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="submit"):
    """Start a sequence. ``salt`` separates tenants in the prefix cache. ``deadline_ms`` counts from receipt. ``marks``: the caller's
    request id and trace id, for log lines."""

    boot: str
    stream: int
    attempt: int
    client: str
    request_id: str
    model: str
    prompt_ids: list[int]
    task: Task
    salt: str = ""
    deadline_ms: int | None = None
    marks: tuple[str, str] = ("", "")


class Attach(msgspec.Struct, frozen=True, kw_only=True, tag="attach"):
    """Take over a live sequence by its permanent name; tokens from position ``have`` on are sent again under the new ``stream``."""

    boot: str
    stream: int
    attempt: int
    client: str
    request_id: str
    have: int
    credit: int = UNLIMITED


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    boot: str
    stream: int
    attempt: int = 0


class Credit(msgspec.Struct, frozen=True, kw_only=True, tag="credit"):
    """Grant ``tokens[i]`` more tokens to ``streams[i]``."""

    boot: Text
    streams: StreamNumbers
    tokens: StreamNumbers


class KeyUse(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What was taken for one API key: requests, tokens reserved for them, reserved tokens given back, all as totals; and requests that run.

    From a router: its own, since the key came into use there. From a leader: those of all other routers, since the leader first heard
    them."""

    key: Annotated[str, Meta(max_length=MAX_KEY_ID)]
    requests: Count
    reserved: Count
    returned: Count
    running: Count = 0

    def follows(self, before: KeyUse) -> bool:
        """Whether the totals can have grown from those of ``before``."""
        return self.requests >= before.requests and self.reserved >= before.reserved and self.returned >= before.returned

    def plus(self, other: KeyUse) -> KeyUse:
        """The sum of the totals; nothing runs."""
        return KeyUse(self.key, self.requests + other.requests, self.reserved + other.reserved, self.returned + other.returned)

    def less(self, other: KeyUse) -> KeyUse:
        """By how much the totals are greater than ``other``'s; nothing runs."""
        return KeyUse(self.key, self.requests - other.requests, self.reserved - other.reserved, self.returned - other.returned)


KeyUses: TypeAlias = Annotated[list[KeyUse], Meta(max_length=MAX_KEYS)]


class RouterHeartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="router_heartbeat"):
    """Sent by a router every ``heartbeat_s``, and at once after a leader's Hello: its name, and every router to which a leader should be
    connected. ``keys``: the API keys with a limit that are in use there, the most active first; None = this
    message says nothing of keys."""

    boot: str
    router: str
    routers: tuple[RouterAddress, ...] = ()
    keys: KeyUses | None = None


# replica → router


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First message of a leader on each connection. A smaller epoch than the largest seen for ``replica`` is answered by Bye."""

    boot: Text
    protocol: int
    replica: Text
    model: Text
    epoch: Annotated[int, Meta(ge=0, le=MAX_EPOCH)]
    resume: ResumeClass
    capacity: Capacity


class Accepted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="accepted"):
    """Acknowledges Submit (a ZeroMQ send proves nothing). To a client: also the data of the journal with which it can continue at another
    router."""

    boot: str
    stream: int
    attempt: int
    seed: int = 0
    prompt_ids: list[int] = []
    prompt_tokens: int = 0


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """State of a leader, sent every ``heartbeat_s`` by its I/O thread even while the engine thread is in a step.

    ``step``: number of the last step that began. ``busy_ms``: age of the running step, 0 when idle; ``predicted_ms``: predicted time of
    that step. ``keys``: what all routers but the receiver take for API keys, those that changed last first; None = this
    message says nothing of keys.
    """

    boot: str
    step: Count
    busy_ms: Milliseconds
    predicted_ms: Milliseconds
    stats: EngineStats
    draining: bool = False
    keys: KeyUses | None = None


class Tokens(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="tokens"):
    """The tokens that one step emitted for one router, in parallel lists; ``firsts[i]`` is the output position of ``tokens[i][0]``.

    ``logprobs[i]`` has one entry per token if the sequence requested them. ``prompt_logprobs`` holds (stream, whole prompt) pairs, once,
    with or before the sequence's first token. ``cached`` holds (stream, prompt tokens found in the prefix cache) pairs, once, with the
    first token, for streams that found any: they are here because a router that ends a stream itself gets no Done. Router → client only:
    ``texts`` (safe to show) and ``choices`` (index if n > 1).
    """

    boot: str
    streams: StreamNumbers
    attempts: StreamNumbers
    firsts: StreamNumbers
    tokens: Annotated[list[Annotated[list[TokenId], Meta(max_length=MAX_DELTA)]], Meta(max_length=MAX_STREAMS)]
    logprobs: Annotated[list[Annotated[list[Logprobs], Meta(max_length=MAX_DELTA)] | None], Meta(max_length=MAX_STREAMS)] | None = None
    prompt_logprobs: (
        Annotated[list[tuple[int, Annotated[list[Logprobs], Meta(max_length=MAX_SCORED)]]], Meta(max_length=MAX_STREAMS)] | None
    ) = None
    cached: Annotated[list[tuple[int, int]], Meta(max_length=MAX_STREAMS)] | None = None
    texts: list[str] | None = None
    choices: list[int] | None = None

    def __post_init__(self) -> None:
        # Written out, because this runs for every message: a loop over the columns costs three times as much.
        length, logprobs, texts, choices = len(self.streams), self.logprobs, self.texts, self.choices
        if (
            len(self.attempts) != length
            or len(self.firsts) != length
            or len(self.tokens) != length
            or (logprobs is not None and len(logprobs) != length)
            or (texts is not None and len(texts) != length)
            or (choices is not None and len(choices) != length)
        ):
            raise ValueError("the columns are not of one length")


class Done(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="done"):
    """A sequence's terminal message (exactly one of Done and Failed). ``stop_id``: the stop token that ended it; it was not sent."""

    boot: str
    stream: int
    attempt: int
    reason: FinishReason
    usage: Usage
    stop_id: int | None = None
    choice: int = 0
    text: str = ""


class Failed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="failed"):
    """A sequence's (or, with ``choice`` 0 and no Accepted, a request's) terminal error; ``code`` as in :mod:`workers.protocol.errors`."""

    boot: Text
    stream: int
    attempt: int
    code: Text
    message: Text
    retry_after: float | None = None
    param: Text | None = None
    choice: int = 0


class Bye(msgspec.Struct, frozen=True, kw_only=True, tag="bye"):
    """The sender ends this connection permanently. From a router: ``stale`` means that a newer epoch lives and the leader must exit."""

    boot: Text
    reason: Text


# client → router, router → client


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """The client's record of one request, with which another router continues it: one ``emitted`` list per choice."""

    prompt_ids: Annotated[list[int], Meta(max_length=MAX_IDS)]
    seed: int
    emitted: Annotated[list[Annotated[list[int], Meta(max_length=MAX_IDS)]], Meta(max_length=MAX_CHOICES)]


class Generate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="generate"):
    """A client's request: ``body`` is the JSON body of the HTTP endpoint of the same name, checked by the same validator.

    ``request_id`` is chosen by the client: a repeated one attaches to the live stream. ``texts`` False = ids only (no detokenizing at the
    router).
    """

    boot: str
    stream: int
    request_id: str
    endpoint: ApiEndpoint
    body: bytes
    attempt: int = 0
    journal: Journal | None = None
    credit: int = UNLIMITED
    deadline_ms: int | None = None
    texts: bool = True


class Query(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="query"):
    """Ask a router for information. ``what``: ``status`` (replica table, queue), ``models``, ``metrics``, ``dump`` (write the last events
    of its core into its run folder), ``story`` (what happened to the requests with the id ``about``), ``usage`` (of API keys)."""

    boot: str
    stream: int
    what: Literal["status", "models", "metrics", "dump", "story", "usage"]
    about: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """Answer to Query; ``body`` is JSON (``metrics``: Prometheus text)."""

    boot: str
    stream: int
    body: bytes


ToReplica: TypeAlias = Submit | Attach | Cancel | Credit | RouterHeartbeat | Bye
FromReplica: TypeAlias = Hello | Accepted | Heartbeat | Tokens | Done | Failed | Bye
FromClient: TypeAlias = Generate | Cancel | Credit | Query
ToClient: TypeAlias = Accepted | Tokens | Done | Failed | Report
Message: TypeAlias = ToReplica | FromReplica | FromClient | ToClient

_encoder = msgspec.msgpack.Encoder()
_to_replica: msgspec.msgpack.Decoder[ToReplica] = msgspec.msgpack.Decoder(ToReplica)
_from_replica: msgspec.msgpack.Decoder[FromReplica] = msgspec.msgpack.Decoder(FromReplica)
_from_client: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
_to_client: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)


class Malformed(Rejected):
    """A frame that is not one message of the expected direction."""

    code = "malformed"


def error_text(error: Exception) -> str:
    """The text of an error for the wire; a long text is cut."""
    return str(error)[:MAX_ERROR_TEXT]


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def _decode(decoder: msgspec.msgpack.Decoder, frame: bytes | memoryview):  # type: ignore[no-untyped-def]
    # The collector would scan all objects of a large message repeatedly while it is decoded.
    large = len(frame) > LARGE_FRAME and gc.isenabled()
    if large:
        gc.disable()
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:  # ValidationError is a DecodeError
        raise Malformed("malformed message", str(error)[:200]) from None
    finally:
        if large:
            gc.enable()


def decode_to_replica(frame: bytes | memoryview) -> ToReplica:
    """Raises :class:`Malformed`; so do the other three."""
    return _decode(_to_replica, frame)  # type: ignore[no-any-return]


def decode_from_replica(frame: bytes | memoryview) -> FromReplica:
    return _decode(_from_replica, frame)  # type: ignore[no-any-return]


def decode_from_client(frame: bytes | memoryview) -> FromClient:
    return _decode(_from_client, frame)  # type: ignore[no-any-return]


def decode_to_client(frame: bytes | memoryview) -> ToClient:
    return _decode(_to_client, frame)  # type: ignore[no-any-return]
