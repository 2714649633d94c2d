"""From a checked body to what the dispatcher takes: names resolved, prompts encoded, everything fitted to the model.

Owns the checks that need the model (vocabulary, context) and the defaults that depend on it. Serves both doors; must never submit.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from orchestrator.auth.api_keys import EVERYONE, Salting, Tenant
from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router import request_context
from orchestrator.router.frontend import schema as bodies
from orchestrator.router.frontend.chat_template import PromptPiece
from orchestrator.router.frontend.detokenizer import TextRule
from orchestrator.router.frontend.sandbox_worker import RenderJob
from orchestrator.router.frontend.schema import ChatBody, CompletionBody, Request, refuse
from orchestrator.router.frontend.text_models import TextModel, TextModels
from orchestrator.router.interfaces import Dispatcher, RouterRequest
from workers.protocol.errors import NotFound, TooLong, Unavailable
from workers.protocol.messages import UNLIMITED, GuideSpec, Journal, SamplingParams
from workers.sampling.definition import MIN_TEMPERATURE

#: Choices that all prompts of one request may ask for together.
MAX_CHOICES = 128
DEFAULT_COMPLETION_TOKENS = 16
#: Bytes of JSON above which decoding would hold the event loop for milliseconds.
INLINE_BODY = 64 << 10
_SEEDS = 2**63


class CallerContext(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks and how, as the door knows it. ``request`` is the door's unique id of the request; ``deadline_s`` counts from now and is cut
    to the admission limit; ``journal``: what the client already holds."""

    client: str
    request: str
    tenant: Tenant = EVERYONE
    affinity: str = ""
    credit: int = UNLIMITED
    deadline_s: float | None = None
    journal: Journal | None = None


class PreparedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One Ask per prompt (several only for lists in completions), their texts (kept only for ``echo``), and the rule for output text."""

    model: TextModel
    asks: tuple[RouterRequest, ...]
    rule: TextRule
    prompts: tuple[str, ...] = ()


class _Frame(msgspec.Struct, frozen=True, kw_only=True):
    """What all prompts of one request share. ``context``: tokens that prompt and output may have together."""

    model: TextModel
    context: int
    guide: GuideSpec | None
    salt: str
    admission: AdmissionSpec


async def decode(body: bytes, texts: TextModels) -> dict[str, Any]:
    """The JSON object that a body holds, a large one decoded in the pool. Raises Rejected."""
    return await texts.run(len(body), lambda: bodies.decode_object(body), inline=INLINE_BODY)


def resolve(name: str, texts: TextModels, tenant: Tenant) -> TextModel:
    """Raises NotFound (``model_not_found``), also for a model that is not the tenant's: the two look the same. The name is echoed cut and
    escaped, for it came from outside."""
    model = texts.get(name)
    if model is None or not tenant.may_use(model.names):
        shown = ascii(name[:64])[1:-1]
        raise NotFound(f"The model `{shown}` does not exist", code="model_not_found", param="model")
    return model


async def prepare(
    request: Request, caller: CallerContext, *, texts: TextModels, dispatcher: Dispatcher, admission: AdmissionSpec, salting: Salting
) -> PreparedRequest:
    """Raises NotFound, TooLong, other Rejected, and Unavailable while no replica has yet said how long its context is."""
    request_context.learn(request.metadata, chat=isinstance(request, ChatBody))
    model = resolve(request.model, texts, caller.tenant)
    status = dispatcher.model(model.name)
    context = (status.max_seq_len if status else 0) or model.card.max_seq_len
    if not context:
        raise Unavailable("no replica of the model is ready", "none has reported yet", "retry shortly", retry_after=1.0)
    vocab = (status.vocab_size if status else 0) or model.table.size
    n = request.n or 1
    if n > admission.max_n:
        refuse("n", f"{n} choices are more than {admission.max_n}")
    _check_ids(request, vocab)
    guide = request.guide()
    if guide is not None and status is not None and not status.guided:
        refuse("response_format", "the model's engine offers no structured output", "unsupported")
    if guide is not None:
        await texts.cells.check(guide)
    encoded = await _encode(request, caller, model, texts, vocab, context)
    if len(encoded) * n > MAX_CHOICES:
        refuse("prompt", f"{len(encoded)} prompts of {n} choices are more than {MAX_CHOICES} choices")
    salt = salting.of(caller.tenant.name, request.cache_salt or "")
    frame = _Frame(model=model, context=context, guide=guide, salt=salt, admission=admission)
    asks = tuple(_ask(request, caller, frame, index, ids) for index, ids in enumerate(encoded))
    rule = TextRule(
        stops=request.stops(),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special=request.skip_special_tokens is not False,
        min_tokens=request.min_tokens or 0,
        json=guide is not None and guide.kind in ("json", "json_schema"),
    )
    return PreparedRequest(model=model, asks=asks, rule=rule, prompts=_echoed(request, encoded, model))


async def encode_prompt(prompt: str | list[int], model: TextModel, texts: TextModels, *, add_special: bool, context: int = 0) -> list[int]:
    """Ids of a raw prompt; special tokens in it are read as such, as the caller of a raw endpoint expects. Raises TooLong where no ids of
    it could fit ``context`` tokens (0 = any do)."""
    if isinstance(prompt, list):
        return prompt
    _check_length(len(prompt), model, context, "prompt")
    return await texts.run(len(prompt), lambda: model.table.encode([PromptPiece(prompt, False)], add_special))


async def encode_chat(request: ChatBody, model: TextModel, texts: TextModels, *, context: int = 0) -> list[int]:
    """Ids of a chat through the model's template. Raises Rejected where it has none, or refuses the messages, and TooLong as above."""
    if model.template is None:
        refuse("messages", "the model has no chat template; use the completions endpoint")
    tools = None if request.tool_choice == "none" else request.tools
    job = RenderJob(
        model=model.name,
        messages=request.messages,
        tools=tools,
        add_generation_prompt=request.add_generation_prompt is not False,
        kwargs=request.chat_template_kwargs,
    )
    pieces = await texts.cells.render(job)
    size = sum(len(piece.text) for piece in pieces)
    _check_length(size, model, context, "messages")
    return await texts.run(size, lambda: model.table.encode(pieces, bool(request.add_special_tokens)))


def _check_length(characters: int, model: TextModel, context: int, part: str) -> None:
    """Raises TooLong without encoding what cannot fit: a megabyte of text takes a second."""
    fewest = characters // model.table.reach
    if context and fewest > context:
        raise _too_long(context, f"at least {fewest} tokens in the {part}", part)


def _too_long(context: int, asked: str, part: str) -> TooLong:
    return TooLong(
        f"This model's maximum context length is {context} tokens, but you asked for {asked}", hint=f"shorten the {part}", param=part
    )


async def _encode(
    request: Request, caller: CallerContext, model: TextModel, texts: TextModels, vocab: int, context: int
) -> list[list[int]]:
    if caller.journal is not None:
        for ids in (caller.journal.prompt_ids, *filter(None, caller.journal.emitted)):
            check_known(ids, vocab, "journal")
        return [caller.journal.prompt_ids]
    if isinstance(request, ChatBody):
        return [await encode_chat(request, model, texts, context=context)]
    add_special = request.add_special_tokens is not False
    encoded = []
    for prompt in request.prompts():
        ids = await encode_prompt(prompt, model, texts, add_special=add_special, context=context)
        if isinstance(prompt, list):
            check_known(ids, vocab, "prompt")
        if not ids:
            refuse("prompt", "encodes to no token at all")
        encoded.append(ids)
    return encoded


def check_known(ids: Sequence[int], vocab: int, param: str) -> None:
    """Raises Rejected unless every id is one of the vocabulary (and there is one)."""
    if not ids or min(ids) < 0 or max(ids) >= vocab:
        refuse(param, f"token ids must be between 0 and {vocab - 1}")


def _check_ids(request: Request, vocab: int) -> None:
    if request.stop_token_ids:
        check_known(request.stop_token_ids, vocab, "stop_token_ids")
    if request.logit_bias:
        check_known([int(key) for key in request.logit_bias], vocab, "logit_bias")


def _seed(request: Request, caller: CallerContext) -> int:
    """The same for every prompt of a list when given (as if each were asked alone), else one of its own for each."""
    if caller.journal is not None:
        return caller.journal.seed % _SEEDS
    return request.seed % _SEEDS if request.seed is not None else secrets.randbits(63)


def _ask(request: Request, caller: CallerContext, frame: _Frame, index: int, ids: list[int]) -> RouterRequest:
    max_tokens = _max_tokens(request, len(ids), frame.context)
    emitted = caller.journal.emitted if caller.journal is not None else []
    if any(len(held) > max_tokens for held in emitted):
        refuse("journal", f"holds more than the {max_tokens} tokens that were asked for")
    limit = frame.admission.request_timeout_s or None
    deadline = caller.deadline_s if limit is None or (caller.deadline_s is not None and caller.deadline_s < limit) else limit
    return RouterRequest(
        client=caller.client,
        request=f"{caller.request}-{index}" if index else caller.request,
        model=frame.model.name,
        prompt_ids=ids,
        params=_params(request, frame, max_tokens, _seed(request, caller)),
        n=request.n or 1,
        salt=frame.salt,
        affinity=caller.affinity or request.user or "",
        credit=caller.credit,
        deadline_s=deadline,
        emitted=emitted,
        marks=request_context.marks(),
    )


def _max_tokens(request: Request, prompt: int, context: int) -> int:
    wanted = request.limit()
    room = context - prompt
    part = "messages" if isinstance(request, ChatBody) else "prompt"
    if room < max(1, wanted or 1):
        asked = (
            f"{prompt + wanted} tokens ({prompt} in the {part}, {wanted} in the completion)" if wanted else f"{prompt} tokens in the {part}"
        )
        raise _too_long(context, asked, part)
    return wanted or (room if isinstance(request, ChatBody) else min(room, DEFAULT_COMPLETION_TOKENS))


def _temperature(asked: float | None) -> float:
    """What is too small to divide by is greedy."""
    return 1.0 if asked is None else asked if asked >= MIN_TEMPERATURE else 0.0


def _params(request: Request, frame: _Frame, max_tokens: int, seed: int) -> SamplingParams:
    own = request.stop_token_ids or []
    stop_ids = own if request.ignore_eos else [*own, *frame.model.eos_ids]
    logprobs = request.wanted_logprobs()
    echoed = logprobs if isinstance(request, CompletionBody) and request.echo else None
    return SamplingParams(
        temperature=_temperature(request.temperature),
        top_k=max(0, request.top_k or 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias={int(key): value for key, value in request.logit_bias.items()} if request.logit_bias else None,
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min(request.min_tokens or 0, max_tokens),
        stop_ids=tuple(dict.fromkeys(stop_ids)),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs if request.prompt_logprobs is not None else echoed,
        guide=frame.guide,
    )


def _echoed(request: Request, encoded: list[list[int]], model: TextModel) -> tuple[str, ...]:
    if not isinstance(request, CompletionBody) or not request.echo:
        return ()
    prompts = request.prompts()
    return tuple(prompt if isinstance(prompt, str) else model.decode(ids) for prompt, ids in zip(prompts, encoded, strict=True))
