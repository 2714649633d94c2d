"""A frame of the largest size costs its receiver milliseconds, whatever its peer put into it, and every number can be counted with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from workers.protocol import messages
from workers.protocol.messages import MAX_FRAME, Malformed, Message

MANY = 7_000_000
GENERATE = {"type": "generate", "boot": "x", "stream": 1, "request_id": "a", "endpoint": "chat", "body": b"{}"}
TOKENS: dict[str, Any] = {"type": "tokens", "boot": "x", "streams": [1], "attempts": [1], "firsts": [1], "tokens": [[1]]}
FAILED = {"type": "failed", "boot": "x", "stream": 1, "attempt": 1, "code": "engine_fault"}
BEAT: dict[str, Any] = {"type": "heartbeat", "boot": "x", "step": 1, "busy_ms": 0.0, "predicted_ms": 1.0, "stats": {}}
Decode = Callable[[bytes], Message]

LARGE: dict[str, tuple[Decode, dict[str, Any]]] = {
    "credit": (messages.decode_from_client, {"type": "credit", "boot": "x", "streams": [1] * MANY, "tokens": []}),
    "choices of a journal": (messages.decode_from_client, GENERATE | {"journal": {"prompt_ids": [1], "seed": 1, "emitted": [[]] * MANY}}),
    "prompt of a journal": (messages.decode_from_client, GENERATE | {"journal": {"prompt_ids": [1] * MANY, "seed": 1, "emitted": []}}),
    "streams": (messages.decode_from_replica, TOKENS | {"streams": [1] * MANY}),
    "token lists": (messages.decode_from_replica, TOKENS | {"tokens": [[]] * MANY}),
    "tokens": (messages.decode_from_replica, TOKENS | {"tokens": [[1] * MANY]}),
    "logprobs": (messages.decode_from_replica, TOKENS | {"logprobs": [[[1, None, [], []]] * (MANY // 5)]}),
    "alternatives": (messages.decode_from_replica, TOKENS | {"logprobs": [[[1, None, [1] * MANY, []]]]}),
    "logprobs of a prompt": (messages.decode_from_replica, TOKENS | {"prompt_logprobs": [[1, [[1, None, [], []]] * (MANY // 5)]]}),
    "cached": (messages.decode_from_replica, TOKENS | {"cached": [[1, 1]] * (MANY // 3)}),
    "an error": (messages.decode_from_replica, FAILED | {"message": "\u00e9" * (MANY // 2)}),
    "a farewell": (messages.decode_from_replica, {"type": "bye", "boot": "x", "reason": "x" * MANY}),
    "prefixes": (messages.decode_from_replica, BEAT | {"stats": {"prefixes": [1] * MANY}}),
    "steps": (messages.decode_from_replica, BEAT | {"stats": {"step_tokens": [1] * MANY}}),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_list_or_text_without_bounds_is_refused_before_it_is_read(name: str) -> None:
    decode, content = LARGE[name]
    frame = msgspec.msgpack.encode(content)
    assert MAX_FRAME // 2 < len(frame) < MAX_FRAME
    begun = time.thread_time()
    with pytest.raises(Malformed, match="length"):
        decode(frame)
    assert time.thread_time() - begun < 0.2


@pytest.mark.parametrize(
    "content",
    [
        TOKENS | {"tokens": [[-1]]},
        TOKENS | {"tokens": [[2**31]]},
        *(BEAT | {field: value} for field in ("busy_ms", "predicted_ms") for value in (float("nan"), float("inf"), -1.0, 1e300)),
        *(BEAT | {"stats": {field: -1}} for field in ("running", "waiting", "free_blocks", "prefill_tokens", "output_tokens_total")),
        *(BEAT | {"stats": {"step_ms": value}} for value in (float("nan"), float("inf"), -1.0)),
        {"type": "done", "boot": "x", "stream": 1, "attempt": 1, "reason": "stop", "usage": {"prompt_tokens": -1, "output_tokens": 0}},
        {"type": "done", "boot": "x", "stream": 1, "attempt": 1, "reason": "stop", "usage": {"prompt_tokens": 1, "output_tokens": 2**60}},
    ],
)
def test_a_number_that_cannot_be_counted_with_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        messages.decode_from_replica(msgspec.msgpack.encode(content))


def test_an_error_is_sent_cut_so_that_it_is_accepted() -> None:
    text = messages.error_text(ValueError("x" * 10**6))
    assert len(text) == messages.MAX_ERROR_TEXT
    failed = messages.Failed(boot="x", stream=1, attempt=1, code="engine_fault", message=text)
    assert messages.decode_from_replica(messages.encode(failed)) == failed
