"""Turns a checked body into requests for the dispatcher: the model is resolved, prompts are encoded, everything is fitted to the model.

Owns the checks that need the model (vocabulary, context) and the defaults that depend on it. Every frontend uses one :class:`Preprocessor`;
it never submits a request.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from orchestrator.auth.api_keys import EVERYONE, Salting, Tenant
from orchestrator.config.router_spec import AdmissionSpec
from orchestrator.router import request_context
from orchestrator.router.core.fair_order import LEAST_URGENT
from orchestrator.router.core.request import RouterRequest
from orchestrator.router.frontend import schema
from orchestrator.router.frontend.chat_template import PromptPiece
from orchestrator.router.frontend.detokenizer import TextRule
from orchestrator.router.frontend.sampling_defaults import SamplingDefaults
from orchestrator.router.frontend.sandbox_worker import RenderJob
from orchestrator.router.frontend.schema import Body, ChatBody, refuse
from orchestrator.router.frontend.text_models import TextModel, TextModels
from orchestrator.router.frontend.tokenizer import TokenTable
from orchestrator.router.interfaces import Dispatcher
from workers.protocol.errors import NotFound, TooLong, Unavailable
from workers.protocol.messages import UNLIMITED, Journal, SamplingParams
from workers.protocol.status import ModelStatus
from workers.sampling.definition import MIN_TEMPERATURE, choice_seed

_N = TypeVar("_N", int, float)

#: Choices that all prompts of one request may ask for together.
MAX_CHOICES = 128
#: Tokens of an answer that are reserved of a key's limit where the request says no ``max_tokens``: what comes beyond is counted at its end.
UNASKED_OUTPUT = 1024
#: Bytes of JSON above which decoding would hold the event loop for milliseconds.
INLINE_BODY = 64 << 10


class CallerContext(msgspec.Struct, frozen=True, kw_only=True):
    """A frontend's facts about a request besides its body. ``client``: the caller. ``request_id``: unique. ``affinity``: the session that
    the caller names. ``credit``: tokens that the client accepts before it grants more. ``deadline_s`` counts from now, None = none.
    ``journal``: what the client has already received of the request, from this router or from another one."""

    client: str
    request_id: str
    tenant: Tenant = EVERYONE
    affinity: str = ""
    credit: int = UNLIMITED
    deadline_s: float | None = None
    journal: Journal | None = None


class PreparedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the dispatcher takes it. ``requests``: one per prompt (several only for lists in completions). ``echoes``: the texts of
    the prompts, only where the answer repeats them. ``rule``: how output ids become text. ``reserve``: tokens that it may take of a key's
    limit: its prompts and its longest answers, of which only :data:`UNASKED_OUTPUT` count where it asks for no limit."""

    model: TextModel
    requests: tuple[RouterRequest, ...]
    rule: TextRule
    reserve: int
    echoes: tuple[str, ...] = ()


class Preprocessor:
    """Prepares the requests of one router, for all of its frontends."""

    def __init__(self, texts: TextModels, dispatcher: Dispatcher, admission: AdmissionSpec, salting: Salting) -> None:
        self._texts, self._dispatcher, self._admission, self._salting = texts, dispatcher, admission, salting

    async def decode(self, body: bytes) -> dict[str, Any]:
        """The JSON object in ``body``; a large one is decoded in the pool. Raises Rejected."""
        return await self._texts.run(len(body), lambda: schema.decode_object(body), inline=INLINE_BODY)

    def models(self, tenant: Tenant) -> list[TextModel]:
        """The models that a tenant may use."""
        return [model for model in self._texts.models if tenant.may_use(model.names)]

    def defaults(self) -> dict[str, dict[str, float]]:
        """The defaults of requests to each model: the model's own, by the names of fields."""
        return {model.name: msgspec.to_builtins(model.defaults) for model in self._texts.models}

    def resolve(self, name: str, tenant: Tenant) -> TextModel:
        """The model that a name or an alias means. Raises NotFound (``model_not_found``), with the same text for a model that the tenant
        may not use. The error shows the name cut and escaped, because the name came from outside."""
        model = self._texts.get(name)
        if model is None or not tenant.may_use(model.names):
            shown = ascii(name[:64])[1:-1]
            raise NotFound(f"The model `{shown}` does not exist", code="model_not_found", param="model")
        return model

    def context(self, model: TextModel) -> int:
        """Maximum tokens of prompt and output together; 0 while neither a replica nor the model's card has reported it."""
        return _context(model, self._dispatcher.model(model.name))

    def encoder(self, model: TextModel, body: Body | None = None) -> ModelEncoder:
        """The encoder of prompts of any length; of ``body``'s it keeps as many tokens as that asks for."""
        context = self.context(model)
        return ModelEncoder(model, self._texts, keep=_kept_tokens(body, context) if body is not None and context else None)

    async def prepare(self, body: Body, caller: CallerContext) -> PreparedRequest:
        """Raises NotFound, TooLong, other Rejected, and Unavailable while no replica has reported how long its context is."""
        request_context.learn(body.metadata, chat=body.endpoint == "chat")
        model = self.resolve(body.model, caller.tenant)
        status = self._dispatcher.model(model.name)
        context = _context(model, status)
        if not context:
            raise Unavailable("no replica of the model is ready", "none has reported yet", "retry shortly", retry_after=1.0)
        vocab = (status.vocab_size if status else 0) or model.table.size
        n = body.n or 1
        if n > self._admission.max_n:
            refuse("n", f"{n} choices are more than {self._admission.max_n}")
        _check_body_ids(body, vocab)
        if body.guide is not None and status is not None and not status.guided:
            refuse(body.guide_field, "the model's engine offers no structured output", "unsupported")
        if body.guide is not None:
            await self._texts.sandbox.check(body.guide, body.guide_field)
        echoes: tuple[str, ...] = ()
        keep = _kept_tokens(body, context)
        if caller.journal is not None:
            # The client has the beginning of the answer already.
            prompts = [_journal_prompt(caller.journal, vocab)]
        else:
            prompts = await body.encode(ModelEncoder(model, self._texts, context=context, vocab=vocab, keep=keep))
            echoes = body.echoes(prompts, model.decode)
        if len(prompts) * n > MAX_CHOICES:
            refuse("prompt", f"{len(prompts)} prompts of {n} choices are more than {MAX_CHOICES} choices")
        rule = TextRule(
            stops=body.stops(),
            include_stop=bool(body.include_stop_str_in_output),
            skip_special=body.skip_special_tokens is not False,
            markers=model.tool_parser.markers if body.tool_rules() is not None else (),
            min_tokens=body.min_tokens or 0,
            json=body.guide is not None and body.guide.kind in ("json", "json_schema"),
        )
        requests = self._requests(body, caller, model, context, prompts)
        longest = [request.params.max_tokens for request in requests]
        if body.max_output is None:
            longest = [min(tokens, UNASKED_OUTPUT) for tokens in longest]
        reserve = sum(map(len, prompts)) + n * sum(longest)
        return PreparedRequest(model=model, requests=requests, rule=rule, reserve=reserve, echoes=echoes)

    def _requests(
        self, body: Body, caller: CallerContext, model: TextModel, context: int, prompts: list[list[int]]
    ) -> tuple[RouterRequest, ...]:
        salt = self._salting.of(caller.tenant.name, body.cache_salt or "")
        emitted = caller.journal.emitted if caller.journal is not None else []
        requests = []
        for index, ids in enumerate(prompts):
            max_tokens = _max_tokens(body, len(ids), context, model.defaults)
            if any(len(tokens) > max_tokens for tokens in emitted):
                refuse("journal", f"holds more than the {max_tokens} tokens that were asked for")
            requests.append(
                RouterRequest(
                    client=caller.client,
                    tenant=request_context.caller(),
                    weight=caller.tenant.terms.weight,
                    priority=min(max(body.priority or 0, caller.tenant.terms.most_urgent), LEAST_URGENT),
                    request_id=f"{caller.request_id}-{index}" if index else caller.request_id,
                    model=model.name,
                    prompt_ids=ids,
                    params=_params(body, model, max_tokens, _seed(body, caller)),
                    n=body.n or 1,
                    salt=salt,
                    affinity=caller.affinity or body.session,
                    credit=caller.credit,
                    deadline_s=caller.deadline_s,
                    emitted=emitted,
                    marks=request_context.marks(),
                )
            )
        return tuple(requests)


class ModelEncoder:
    """Encodes prompts for one model: a :class:`~orchestrator.router.frontend.schema.PromptEncoder`.

    ``context``: a prompt that cannot fit into so many tokens raises TooLong before it is encoded (0 = any length). ``vocab``: size of the
    vocabulary that a request's token ids must be in (None = no check, and a prompt may have no tokens). ``keep``: tokens to keep of a
    longer prompt, its last ones (None = all).
    """

    def __init__(
        self, model: TextModel, texts: TextModels, *, context: int = 0, vocab: int | None = None, keep: int | None = None
    ) -> None:  # fmt: skip
        self._model, self._texts, self._vocab, self._keep = model, texts, vocab, keep
        self._context = 0 if keep is not None else context

    async def prompt(self, prompt: str | list[int], *, add_special: bool) -> list[int]:
        """Ids of a raw prompt. Special tokens in its text are read as such, as callers of a raw endpoint expect."""
        if isinstance(prompt, list):
            if self._vocab is not None:
                check_ids(prompt, self._vocab, "prompt")
            return prompt if self._keep is None else prompt[-self._keep :]
        self._check_length(len(prompt), "prompt")
        table = self._model.table
        ids = await self._texts.run(len(prompt), lambda: table.encode([PromptPiece(prompt, False)], add_special, self._keep))
        if not ids and self._vocab is not None:
            refuse("prompt", "encodes to no token at all")
        return ids

    async def chat(self, body: ChatBody) -> list[int]:
        """Ids of a chat by the model's template. Raises Rejected where the model has none, and where the template refuses the messages."""
        if self._model.template is None:
            refuse("messages", "the model has no chat template; use the completions endpoint")
        job = RenderJob(
            model=self._model.name,
            messages=[message.sent for message in body.messages],
            tools=None if body.tool_choice == "none" else [tool.sent for tool in body.tools or ()],
            documents=body.documents,
            add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
            continue_final_message=bool(body.continue_final_message),
            reasoning_effort=body.reasoning_effort,
            kwargs=body.chat_template_kwargs,
        )
        pieces = await self._texts.render(job)
        size = sum(len(piece.text) for piece in pieces)
        self._check_length(size, "messages")
        return await self._texts.run(size, lambda: self._model.table.encode(pieces, bool(body.add_special_tokens), self._keep))

    def _check_length(self, characters: int, field: str) -> None:
        """Raises TooLong without encoding what cannot fit: a megabyte of text takes a second."""
        fewest = characters // self._model.table.reach
        if self._context and fewest > self._context:
            raise _too_long(self._context, f"at least {fewest} tokens in the {field}", field)


def check_ids(ids: Sequence[int], vocab: int, param: str) -> None:
    """Raises Rejected unless there are ids and every one is in the vocabulary. The replica checks again: it does not trust its routers."""
    if not ids or min(ids) < 0 or max(ids) >= vocab:
        refuse(param, f"token ids must be between 0 and {vocab - 1}")


def _check_body_ids(body: Body, vocab: int) -> None:
    if body.stop_token_ids:
        check_ids(body.stop_token_ids, vocab, "stop_token_ids")
    if body.logit_bias:
        check_ids([int(key) for key in body.logit_bias], vocab, "logit_bias")
    if body.allowed_token_ids:
        check_ids(body.allowed_token_ids, vocab, "allowed_token_ids")


def _journal_prompt(journal: Journal, vocab: int) -> list[int]:
    """The prompt as it was encoded when the request was first accepted."""
    for ids in (journal.prompt_ids, *filter(None, journal.emitted)):
        check_ids(ids, vocab, "journal")
    return journal.prompt_ids


def _context(model: TextModel, status: ModelStatus | None) -> int:
    return (status.max_seq_len if status else 0) or model.card.max_seq_len


def _seed(body: Body, caller: CallerContext) -> int:
    """The seed of one prompt: the one that the request gives to all its prompts, as if each was sent alone, or else a new one."""
    if caller.journal is not None:
        return choice_seed(caller.journal.seed, 0)
    return choice_seed(body.seed, 0) if body.seed is not None else secrets.randbits(63)


def _kept_tokens(body: Body, context: int) -> int | None:
    """Tokens to keep of a prompt; None = all. -1 asks for as many as leave room for the answer."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return None
    if keep > context:
        refuse("truncate_prompt_tokens", f"{keep} is more than the model's maximum context length of {context} tokens")
    asked = body.max_output
    return keep if keep > 0 else max(1, context - (body.default_max_output(1) if asked is None else asked))


def _max_tokens(body: Body, prompt: int, context: int, defaults: SamplingDefaults) -> int:
    wanted, room, field = body.max_output, context - prompt, body.prompt_field
    if room < (1 if wanted is None else wanted):
        parts = f"{prompt} in the {field}, {wanted} in the completion"
        asked = f"{prompt + wanted} tokens ({parts})" if wanted else f"{prompt} tokens in the {field}"
        raise _too_long(context, asked, field)
    return body.default_max_output(room, defaults.max_tokens) if wanted is None else wanted


def _too_long(context: int, asked: str, field: str) -> TooLong:
    return TooLong(
        f"This model's maximum context length is {context} tokens, but you asked for {asked}", hint=f"shorten the {field}", param=field
    )


def _params(body: Body, model: TextModel, max_tokens: int, seed: int) -> SamplingParams:
    own, defaults = body.stop_token_ids or [], model.defaults
    stop_ids = own if body.ignore_eos else [*own, *model.eos_ids]
    temperature = _given(body.temperature, defaults.temperature, 1.0)
    return SamplingParams(
        # A temperature that is too small to divide by means greedy decoding.
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_k=max(0, _given(body.top_k, defaults.top_k, 0)),
        top_p=_given(body.top_p, defaults.top_p, 1.0),
        min_p=_given(body.min_p, defaults.min_p, 0.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_given(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias={int(key): value for key, value in body.logit_bias.items()} if body.logit_bias else None,
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(sorted(set(body.allowed_token_ids))),
        bad_words=_bad_words(body.bad_words or [], model.table),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min(body.min_tokens or 0, max_tokens),
        stop_ids=tuple(dict.fromkeys(stop_ids)),
        ignore_eos=bool(body.ignore_eos),
        logprobs=body.num_logprobs,
        prompt_logprobs=body.num_prompt_logprobs,
        guide=body.guide,
    )


def _given(asked: _N | None, default: _N | None, otherwise: _N) -> _N:
    return asked if asked is not None else default if default is not None else otherwise


def _bad_words(words: Sequence[str], table: TokenTable) -> tuple[tuple[int, ...], ...]:
    """The ids of each word as it begins a text, and, where they are as many, those of the word after a blank: vLLM's rule."""
    found: list[tuple[int, ...]] = []
    for word in words:
        first, later = (tuple(table.encode([PromptPiece(before + word.lstrip(), False)], False)) for before in ("", " "))
        if first:
            found.append(first)
        if later and (not first or (later[0] != first[0] and len(later) == len(first))):
            found.append(later)
    return tuple(dict.fromkeys(found))
