"""The JSON objects and server-sent events of OpenAI's two generating endpoints, with vLLM's additions.

Owns ids, objects, choices, usage, logprobs and errors as they are written. The only state is the running text offset of a choice's
logprobs. A streamed chunk of text alone is three byte strings put together.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import msgspec

from orchestrator.router.frontend.text_models import TextModel
from orchestrator.router.frontend.tool_parsers.events import CallDelta
from orchestrator.router.http.event_stream import encode, event
from workers.protocol.errors import RateLimited, Rejected, TriremeError, Unauthorized, printable
from workers.protocol.messages import FinishReason, Logprobs, Usage

DONE = b"data: [DONE]\n\n"
#: JSON has no minus infinity; vLLM's stand-in.
NO_CHANCE = -9999.0


class Wording(msgspec.Struct, frozen=True, kw_only=True):
    """One request's constants. ``model`` is the name that the client used; ``created`` Unix seconds. ``functions``: calls are written in
    the form before tools."""

    id: str
    created: int
    model: str
    chat: bool
    usage: bool = False
    continuous: bool = False
    functions: bool = False

    def opening(self, index: int) -> bytes:
        """A plain text chunk up to its text."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        common = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[{"index":%d,%b' % (
            encode(self.id), kind.encode(), self.created, encode(self.model), index, b'"delta":{"content":' if self.chat else b'"text":',
        )  # fmt: skip
        return common

    def closing(self) -> bytes:
        """A plain text chunk from its text on; where a usage chunk will follow, the others carry a null (as OpenAI's do)."""
        end = b',"usage":null}\n\n' if self.usage else b"}\n\n"
        return (b"}" if self.chat else b"") + b',"logprobs":null,"finish_reason":null}]' + end

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, **more: Any) -> bytes:
        """``more``: further fields of the chunk."""
        body: dict[str, Any] = {**self._body("chat.completion.chunk", choices), **more}
        if self.usage:
            body["usage"] = usage
        return event(body)

    def answer(self, choices: list[dict[str, Any]], usage: dict[str, Any], **more: Any) -> bytes:
        """``more``: further fields of the answer."""
        return encode({**self._body("chat.completion", choices), "usage": usage, **more})

    def call_delta(self, piece: CallDelta) -> dict[str, Any]:
        """The ``delta`` that a piece of a call makes."""
        return {"function_call": piece.json()["function"]} if self.functions else {"tool_calls": [piece.json()]}

    def finish(self, reason: FinishReason, *, called: bool) -> str:
        """``finish_reason``; ``called``: the choice holds calls."""
        if not called or reason != "stop":
            return reason
        return "function_call" if self.functions else "tool_calls"

    def choice(self, index: int, text: str, *, first: bool, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        """One streamed choice; ``first``: a chat's first delta names the role."""
        delta = {"role": "assistant", "content": text} if first else {"content": text} if text or reason is None else {}
        shown = {"delta": delta} if self.chat else {"text": text}
        return {"index": index, **shown, "logprobs": logprobs, "finish_reason": reason}

    def _body(self, chat_kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = chat_kind if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage_json(prompt: int, output: int, cached: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    if cached is not None:
        found["prompt_tokens_details"] = {"cached_tokens": cached}
    return found


def total_usage(prompts: Sequence[Sequence[Usage]]) -> dict[str, Any]:
    """Usage of a request from the usage of its choices, grouped by prompt. A prompt counts once, whatever the number of its choices."""
    prompt = sum(max((usage.prompt_tokens for usage in choices), default=0) for choices in prompts)
    cached = sum(max((usage.cached_tokens for usage in choices), default=0) for choices in prompts)
    return usage_json(prompt, sum(usage.output_tokens for choices in prompts for usage in choices), cached)


def error_body(error: TriremeError) -> dict[str, Any]:
    if isinstance(error, Unauthorized):
        kind = "authentication_error"
    elif isinstance(error, Rejected):
        kind = "invalid_request_error"
    elif isinstance(error, RateLimited):
        kind = "tokens" if error.kind == "tokens" else "requests"
    elif error.status == 429:
        kind = "rate_limit_error"
    else:
        kind = "server_error"
    return {"error": {"message": printable(str(error)), "type": kind, "param": error.param, "code": error.code}}


class LogprobWriter:
    """Writes the logprobs of one choice in the form of its endpoint. Keeps the text offset that the form of completions needs.

    ``as_ids``: tokens are written as ``token_id:N``. Otherwise the form of completions, in which a token's text is a key, writes a token
    that is no text of its own (a part of a character) as OpenAI's API does, ``bytes:\\xe6\\x97``; and where another token of the same
    position has the same text already, as ``token_id:N``. So no two tokens of a position become one entry.
    """

    def __init__(self, model: TextModel, chat: bool, *, as_ids: bool = False) -> None:
        self._model, self._chat, self._as_ids = model, chat, as_ids
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._offset = 0

    def write(self, entries: Sequence[Logprobs]) -> dict[str, Any]:
        return {"content": [self._chat_entry(entry) for entry in entries]} if self._chat else self._completion(entries)

    def skip(self, text: str) -> None:
        """Count text that comes before the first token (an echoed prompt)."""
        self._offset += len(text)

    def _chat_entry(self, entry: Logprobs) -> dict[str, Any]:
        top = [self._named(id, value) for id, value in zip(entry.top_ids, entry.top_logprobs, strict=True)]
        return {**self._named(entry.token, entry.logprob), "top_logprobs": top}

    def _named(self, id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._model.table.join((id,), skip_special=False)
        token = token_id(id) if self._as_ids else raw.decode("utf-8", "replace")
        return {"token": token, "logprob": clamp(logprob), "bytes": list(raw)}

    def _completion(self, entries: Sequence[Logprobs]) -> dict[str, Any]:
        tokens, values, tops, offsets = [], [], [], []
        for entry in entries:
            names: dict[int, str] = {}
            for id in (*entry.top_ids, entry.token):
                if id not in names:
                    name = token_id(id) if self._as_ids else self._key(id)
                    names[id] = name if name not in names.values() else token_id(id)
            tokens.append(names[entry.token])
            values.append(clamp(entry.logprob))
            tops.append(_top(names, entry))
            offsets.append(self._offset)
            self._offset += len(self._decode(self._model.table.join((entry.token,))))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _key(self, id: int) -> str:
        raw = self._model.table.join((id,), skip_special=False)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}" for byte in raw)


def _top(names: dict[int, str], entry: Logprobs) -> dict[str, float] | None:
    """The alternatives of one position, and its own token."""
    if entry.logprob is None:
        return None
    found = {names[id]: max(value, NO_CHANCE) for id, value in zip(entry.top_ids, entry.top_logprobs, strict=True)}
    found.setdefault(names[entry.token], max(entry.logprob, NO_CHANCE))
    return found


def token_id(id: int) -> str:
    """A token by its number, in vLLM's spelling."""
    return f"token_id:{id}"


def clamp(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, NO_CHANCE)


def merge_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """One logprobs object from those of consecutive tokens."""
    if not parts:
        return None
    return {key: [item for part in parts for item in part[key]] for key in parts[0]}


def prompt_logprobs_json(model: TextModel, entries: Sequence[Logprobs]) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: per position a map from id to logprob, rank (null where not among the best) and text."""
    found: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry.logprob is None:
            found.append(None)
            continue
        ranked = {id: (value, rank) for rank, (id, value) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1)}
        rows: dict[int, tuple[float, int | None]] = {entry.token: ranked.get(entry.token, (entry.logprob, None)), **ranked}
        found.append(
            {
                str(id): {"logprob": clamp(value), "rank": rank, "decoded_token": model.decode((id,), skip_special=False)}
                for id, (value, rank) in rows.items()
            }
        )
    return found
