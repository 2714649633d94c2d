"""A real router process, and a replica that says over the wire exactly what a test tells it to.

Owns the router process and the replica's socket. The router never loses the replica for its silence, so nothing here depends on time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

from orchestrator.config.router_spec import HttpSpec
from tests.recorded import door
from tests.support.gang import short_folder, wait_for
from tests.support.impostor import Impostor, dealer
from tests.support.router_process import RouterRun
from workers.protocol.messages import Accepted, Cancel, Done, Failed, Logprobs, RouterHeartbeat, Submit, Tokens, Usage

MAX_BODY = 1 << 16
FOREVER_S = 3600.0
EPOCH = 7


class Line(NamedTuple):
    """What the replica says for one choice: ``pieces``, a message each, then how it ends. ``ends`` False: the router ends it by itself."""

    pieces: tuple[str | bytes, ...]
    reason: Any = "stop"
    stop_id: int | None = None
    ends: bool = True
    fails: str = ""


def score(tokens: Sequence[int], count: int) -> list[Logprobs]:
    """Made-up log-probabilities: the token is the best of its position, and its successors follow."""
    return [Logprobs(id, -0.5, [id + i for i in range(count)], [-0.5 - i for i in range(count)]) for id in tokens]


class Stage:
    """Use as a context manager: the router serves the model ``m``, and the replica ``a`` is ready. ``url`` is the HTTP door."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Stage:
        try:
            self.folder: Path = self._stack.enter_context(short_folder())
            spec = HttpSpec(port=0, max_body_bytes=MAX_BODY)
            self.router = self._stack.enter_context(RouterRun(self.folder, http=spec, replica_timeout_s=FOREVER_S, hang_floor_s=FOREVER_S))
            self.state = self.router.wait_serving()
            self.url = self.state.http
            self.replica = self.replica_named("a", "boot-a")
            self._clients = self._stack.enter_context(ThreadPoolExecutor(1))
            wait_for(lambda: self.get("/ready").status == 200, what="the replica at the router")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def replica_named(self, name: str, boot: str) -> Impostor:
        """One more replica, which has said hello and one heartbeat."""
        replica = Impostor(self._stack.enter_context(dealer(self.state.back)), boot)
        replica.hello(name, epoch=EPOCH)
        replica.hear(RouterHeartbeat)
        replica.beat()
        return replica

    @property
    def places(self) -> dict[str, str]:
        """What of this run stands in its answers, and how it is shown."""
        return {str(self.folder): "<folder>", self.url: "<url>"}

    def get(self, path: str) -> door.Answer:
        return door.ask(self.url, "GET", path)

    def post(self, path: str, body: Any, lines: Sequence[Line], name: str = "recorded") -> tuple[door.Answer, list[dict[str, Any]]]:
        """Ask while the replica says ``lines``, one a row, in step with each other. Answers the bytes and what the replica was asked."""
        asking = self._clients.submit(door.ask, self.url, "POST", path, body, {"x-request-id": name})
        submits = [self.replica.hear(Submit) for _ in lines]
        self.play(submits, lines)
        return asking.result(door.BOUND_S), [json.loads(msgspec.json.encode(submit)) for submit in submits]

    def play(self, submits: Sequence[Submit], lines: Sequence[Line]) -> None:
        """Everything of one position in one message, as one step of an engine does."""
        tell, boot = self.replica.tell, self.replica.boot
        for submit in submits:
            tell(Accepted(boot=boot, stream=submit.stream, attempt=submit.attempt))
        sent = [0] * len(lines)
        for position in range(max((len(line.pieces) for line in lines), default=0) + 1):
            choices = [index for index, line in enumerate(lines) if position < len(line.pieces)]
            if choices:
                tell(self._step(submits, lines, choices, position, sent))
            for index, line in enumerate(lines):
                if position == len(line.pieces):
                    self._end(submits[index], line, sent[index])

    def _step(self, submits: Sequence[Submit], lines: Sequence[Line], choices: Sequence[int], position: int, sent: list[int]) -> Tokens:
        pieces = [lines[index].pieces[position] for index in choices]
        ids = [list(piece.encode() if isinstance(piece, str) else piece) for piece in pieces]
        firsts = [sent[index] for index in choices]
        for index, tokens in zip(choices, ids, strict=True):
            sent[index] += len(tokens)
        wanted = [submits[index].task.params.logprobs for index in choices]
        logprobs = [None if count is None else score(tokens, count) for count, tokens in zip(wanted, ids, strict=True)]
        prompts = [
            (submits[index].stream, [Logprobs(submits[index].prompt_ids[0], None, [], []), *score(submits[index].prompt_ids[1:], count)])
            for index in choices
            if position == 0 and (count := submits[index].task.params.prompt_logprobs) is not None
        ]
        return Tokens(
            boot=self.replica.boot,
            streams=[submits[index].stream for index in choices],
            attempts=[submits[index].attempt for index in choices],
            firsts=firsts,
            tokens=ids,
            logprobs=logprobs if any(logprobs) else None,
            prompt_logprobs=prompts or None,
        )

    def _end(self, submit: Submit, line: Line, output: int) -> None:
        names = {"boot": self.replica.boot, "stream": submit.stream, "attempt": submit.attempt}
        usage = Usage(prompt_tokens=len(submit.prompt_ids), output_tokens=output, cached_tokens=1)
        if line.fails:
            self.replica.tell(Failed(**names, code=line.fails, message="it fails as it was ordered to"))
        elif line.ends:
            self.replica.tell(Done(**names, reason=line.reason, usage=usage, stop_id=line.stop_id))
        else:
            self.replica.hear(Cancel)
            self.replica.tell(Done(**names, reason="cancelled", usage=usage))
