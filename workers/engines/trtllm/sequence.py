"""A request of TensorRT-LLM's backends: its known tokens, how many of them were emitted, and the job that continues it.

Owns the record and everything that follows from it: where a stop token ends it, how much its credit lets it emit, and the job that
generates the rest. A sequence continues with a job for the tokens after its prompt and known tokens: after a failover, after its cache was
released, or after TensorRT-LLM ended it early. Pure; must never know a backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from workers.protocol.engine import Emission, Fault, Finish
from workers.protocol.errors import EngineFault, TooLong, TriremeError, Unsupported
from workers.protocol.messages import Capacity, FinishReason, Logprobs, SamplingParams, Submit, Usage
from workers.sampling.definition import stop_set
from workers.scheduler.sequence import check_request

#: Kinds of grammar that TensorRT-LLM's published API has a name for; a choice is converted to a regular expression.
GUIDES = frozenset({"json", "json_schema", "regex", "choice"})
_GOLDEN = 0x9E3779B97F4A7C15


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One generation by TensorRT-LLM: at least ``min_new`` and at most ``max_new`` tokens after ``input_ids``. ``stops``: ids that end it,
    ascending.

    TensorRT-LLM has one ``end_id``, which it bans until ``min_new`` tokens are generated, and further stop ids, which it does not ban.
    These would end the job too early, so they are passed only if ``min_new`` is reached. The sequence itself checks for all of them.
    """

    id: int
    input_ids: list[int]
    max_new: int
    min_new: int
    seed: int
    stops: tuple[int, ...]
    params: SamplingParams
    salt: str

    @property
    def end_id(self) -> int | None:
        return self.stops[0] if self.stops else None

    @property
    def further_stops(self) -> tuple[int, ...]:
        return self.stops[1:] if self.min_new == 0 else ()


class Delta(msgspec.Struct, frozen=True, gc=False):
    """The output of one job in one poll, by the backend's ``handle``. ``logprobs``: one per token, or None; ``error``: the job failed."""

    handle: int
    tokens: list[int]
    logprobs: list[float] | None = None
    final: bool = False
    error: str = ""


class TrtllmLimits(msgspec.Struct, frozen=True, kw_only=True):
    """A backend's limits for sequences. ``max_input_len``: longest input of one job, tokens."""

    capacity: Capacity
    max_input_len: int
    eos_ids: tuple[int, ...]


@dataclass(slots=True, eq=False)
class TrtllmSequence:
    """A live request. ``tokens``: all known output, beginning with the tokens of its Submit; ``emitted`` of them were emitted. ``handle``:
    the running job, 0 = none; ``known_at_start``: len(tokens) when it started. ``end``: how the sequence ends when all tokens are
    emitted."""

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    salt: str
    stops: frozenset[int]
    tokens: list[int]
    emitted: int
    credit: int
    handle: int = 0
    known_at_start: int = 0
    paused_at: float = 0.0
    preemptions: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)
    end: Finish | Fault | None = None

    @property
    def can_emit(self) -> bool:
        """Whether :meth:`emit` would return tokens, or the end."""
        waiting = len(self.tokens) - self.emitted
        return (waiting > 0 and self.credit > 0) or (waiting == 0 and self.end is not None)

    @property
    def startable(self) -> bool:
        """Whether it needs a job and none runs."""
        return self.end is None and self.handle == 0 and self.credit > 0 and self.emitted == len(self.tokens)

    @property
    def input_len(self) -> int:
        """Input tokens of its running job."""
        return len(self.prompt_ids) + self.known_at_start

    def job(self) -> Job:
        """The job for the rest of the output."""
        known = len(self.tokens)
        return Job(
            id=self.id,
            input_ids=self.prompt_ids + self.tokens,
            max_new=self.params.max_tokens - known,
            min_new=max(0, self.params.min_tokens - known),
            seed=continued_seed(self.params.seed, known),
            stops=tuple(sorted(self.stops)),
            params=self.params,
            salt=self.salt,
        )

    def take(self, delta: Delta) -> None:
        """Add the output of its job; sets ``end`` if the output ends the sequence, or clears ``handle`` if it only ended the job."""
        if delta.error:
            self.end = Fault("engine_fault", delta.error)
            return
        scored = self.params.logprobs is not None
        if scored and (delta.logprobs is None or len(delta.logprobs) != len(delta.tokens)):
            self.end = Fault("engine_fault", "TensorRT-LLM returned no log-probability for a token")
            return
        for i, token in enumerate(delta.tokens):
            if token in self.stops and len(self.tokens) >= self.params.min_tokens:
                self.end = self.finish_record("stop", token)
                return
            self.tokens.append(token)
            if scored and delta.logprobs is not None:
                self.logprobs.append(Logprobs(token, delta.logprobs[i], [], []))
            if len(self.tokens) >= self.params.max_tokens:
                self.end = self.finish_record("length")
                return
        if delta.final:
            self._job_ended()

    def _job_ended(self) -> None:
        """TensorRT-LLM ended the job by itself: at an end-of-sequence id that it does not return, or early."""
        if len(self.tokens) >= self.params.min_tokens and self.stops:
            self.end = self.finish_record("stop", next(iter(self.stops)) if len(self.stops) == 1 else None)
        elif len(self.tokens) > self.known_at_start:
            self.handle = 0
            self.preemptions += 1
        else:
            self.end = Fault("engine_fault", f"TensorRT-LLM ended the request at output position {len(self.tokens)} without a token")

    def fail(self, error: TriremeError) -> None:
        """End it with an error of its next job."""
        self.end = Fault(error.code, str(error))

    def emit(self) -> Emission:
        """Emit the tokens that credit allows, and after the last token the end."""
        first = self.emitted
        last = min(len(self.tokens), first + max(0, self.credit))
        self.emitted, self.credit = last, self.credit - (last - first)
        logprobs: list[Logprobs] | None = None
        if self.params.logprobs is not None and last > first:
            logprobs, self.logprobs = self.logprobs[: last - first], self.logprobs[last - first :]
        return Emission(self.id, first, self.tokens[first:last], logprobs, None, self.end if last == len(self.tokens) else None)

    def finish_record(self, reason: FinishReason, stop_id: int | None = None) -> Finish:
        usage = Usage(prompt_tokens=len(self.prompt_ids), output_tokens=len(self.tokens), preemptions=self.preemptions)
        return Finish(reason, usage, stop_id)


def make_sequence(id: int, request: Submit, limits: TrtllmLimits) -> TrtllmSequence:
    """The sequence of a request.

    Raises TooLong, Rejected or Unsupported for requests that TensorRT-LLM cannot run, and EngineFault for those that it cannot *continue*:
    a grammar restarts with each job, and the input of a continuation contains the tokens emitted so far.
    """
    task, params = request.task, request.task.params
    _refuse_unsupported(params, limits)
    check_request(request, limits.capacity)
    nothing_to_emit = len(task.emitted) >= params.max_tokens
    known = len(request.prompt_ids) + len(task.emitted)
    if known > limits.max_input_len and not nothing_to_emit:
        what = f"an input of {known} tokens is longer than this engine takes"
        why = f"its max_input_len is {limits.max_input_len}, and it was built without chunked context"
        if task.emitted:
            raise EngineFault(what, f"{why}; {len(task.emitted)} of them are output that another replica had given")
        raise TooLong(what, why, "shorten the prompt, or build the engine with use_paged_context_fmha", param="prompt")
    if params.guide is not None and task.emitted and not nothing_to_emit:
        raise EngineFault("TensorRT-LLM cannot continue a guided answer", "a grammar can only be followed from its start", "ask again")
    seq = TrtllmSequence(
        id=id,
        prompt_ids=request.prompt_ids,
        params=params,
        salt=request.salt,
        stops=stop_set(params, limits.eos_ids),
        tokens=list(task.emitted),
        emitted=len(task.emitted),
        credit=task.credit,
    )
    if nothing_to_emit:
        seq.end = seq.finish_record("length")
    return seq


def _refuse_unsupported(params: SamplingParams, limits: TrtllmLimits) -> None:
    if params.prompt_logprobs is not None:
        raise Unsupported("prompt_logprobs is not offered by the TensorRT-LLM engine", param="prompt_logprobs")
    if params.allowed_token_ids is not None:
        raise Unsupported("allowed_token_ids is not offered by the TensorRT-LLM engine", param="allowed_token_ids")
    if params.guide is None:
        return
    if not limits.capacity.guided:
        raise Unsupported("guided output is not offered by this engine", "trtllm.guided_decoding is not set", param="response_format")
    if params.guide.kind not in GUIDES:
        raise Unsupported(f"a {params.guide.kind} guide is not offered by the TensorRT-LLM engine", param="response_format")
    if params.guide.whitespace is not None:
        raise Unsupported("white space in JSON cannot be set in the TensorRT-LLM engine", param="response_format")


def continued_seed(seed: int, known: int) -> int:
    """Seed of a job that begins after ``known`` output tokens; 63 bits. It differs for each ``known``, because otherwise a continuation
    would use the random numbers of the beginning again."""
    return seed if known == 0 else (seed ^ (known * _GOLDEN)) % 2**63
