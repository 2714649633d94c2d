"""The bodies of generating requests, checked: the OpenAI API with vLLM's additions.

Owns the fields, their types and every limit that can be checked without a model; :mod:`orchestrator.router.frontend.preprocess` checks the
rest (tokens, context, vocabulary). Every frontend (HTTP in each dialect, RPC) reads its requests with this module, so the module knows
none of them, and it never fetches anything.

A mistake that would change an answer is refused (types, ranges, duplicate keys); unknown fields, which newer clients send, are ignored and
counted. Every refusal is :class:`~workers.protocol.errors.Rejected` with the field in ``param``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NoReturn, Protocol, TypeVar

import msgspec

from orchestrator.router.frontend import known_fields, structured_output
from orchestrator.router.frontend.chat_messages import PART_TYPES, ContentPart, Message, NamedTool, Tool, ToolFunction, ToolName, ToolRules
from workers.protocol.errors import Rejected, printable
from workers.protocol.messages import ApiEndpoint, GuideSpec

MAX_MESSAGES = 10_000
MAX_PROMPTS = 128
MAX_KEYS = 1024
MAX_NESTING = 128
MAX_NAME = 256
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_BAD_WORDS, MAX_BAD_WORD_CHARS = 256, 256
MAX_LOGPROBS = 20
MAX_TOOLS = 128
DEFAULT_COMPLETION_TOKENS = 16
MAX_USER = 512
MAX_METADATA_BYTES = 16 << 10
MAX_KWARGS_BYTES = 16 << 10
INT32_MAX = 2**31 - 1

#: Arguments that the chat template is given by this router; a client that sets one would replace them.
RESERVED_KWARGS = frozenset((
    "messages", "tools", "conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message",
    "bos_token", "eos_token", "raise_exception", "strftime_now", "padding", "truncation", "max_length", "return_tensors", "return_dict",
))  # fmt: skip
#: Inclusive ranges of numbers (None = open); ``_OPEN_BELOW`` names those whose lower end is excluded.
_RANGES: dict[str, tuple[float, float | None]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, 10.0),
    "top_k": (-1, INT32_MAX),
    "seed": (-(2**63), 2**63 - 1),
    "max_tokens": (0, INT32_MAX),
    "max_completion_tokens": (1, INT32_MAX),
    "min_tokens": (0, INT32_MAX),
    "truncate_prompt_tokens": (-1, INT32_MAX),
    "n": (1, INT32_MAX),
    "best_of": (1, INT32_MAX),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "top_logprobs": (0, MAX_LOGPROBS),
}
_OPEN_BELOW = frozenset(("top_p", "repetition_penalty"))
#: Fields whose items are kept as they were sent, beside their checked form.
_SENT = frozenset(("messages", "tools"))
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``include_obfuscation``: accepted; the chunks are not padded."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class PromptEncoder(Protocol):
    """Turns the prompts of a body into token ids. Raises Rejected, also where a prompt is too long."""

    async def chat(self, body: ChatBody) -> list[int]: ...

    async def prompt(self, prompt: str | list[int], *, add_special: bool) -> list[int]: ...


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Fields that both endpoints take; None = not given. What is derived from them at some cost is computed once and kept."""

    endpoint: ClassVar[ApiEndpoint]
    #: The field that holds the prompt.
    prompt_field: ClassVar[str]

    model: str
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    best_of: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: structured_output.ResponseFormat | None = None
    structured_outputs: structured_output.StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    guided_whitespace_pattern: str | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    request_id: str | None = None
    metadata: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int | None = None

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def max_output(self) -> int | None:
        """The limit on output tokens that was asked for."""
        return self.max_tokens

    @property
    def session(self) -> str:
        """The session that the body names, or an empty text."""
        return self.prompt_cache_key or self.user or ""

    @functools.cached_property
    def guide(self) -> GuideSpec | None:
        """The grammar that was asked for, or that of a forced tool call. Raises Rejected on two grammars, and on one that is malformed."""
        older = structured_output.StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            grammar=self.guided_grammar,
            choice=self.guided_choice,
            whitespace_pattern=self.guided_whitespace_pattern,
        )
        return structured_output.choose(self.response_format, self.structured_outputs, older, self._forced_call())

    @property
    def guide_field(self) -> str:
        """The field that asked for :attr:`guide`."""
        if self.response_format is not None and self.response_format.type != "text":
            return "response_format"
        fields = ("guided_json", "guided_regex", "guided_grammar", "guided_choice", "structured_outputs")
        return next((field for field in fields if getattr(self, field) is not None), "tools")

    def tool_rules(self) -> ToolRules | None:
        """How the output may call tools; None = it may not."""
        return None

    def check(self) -> None:
        """Raises Rejected where a value is out of its limits."""
        _check_common(self)

    def _forced_call(self) -> GuideSpec | None:
        """The grammar of the tool call that the output must be; None = it need not be one."""
        return None


class ChatBody(GenerateBody, frozen=True, kw_only=True):
    """Body of ``/v1/chat/completions``."""

    endpoint: ClassVar[ApiEndpoint] = "chat"
    prompt_field: ClassVar[str] = "messages"

    messages: list[Message]
    max_completion_tokens: int | None = None
    echo: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[ToolFunction] | None = None
    function_call: Literal["none", "auto"] | ToolName | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def max_output(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each output token; None = no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives to report with each prompt token; None = no logprobs of the prompt."""
        return self.prompt_logprobs

    def echoes(self, prompts: list[list[int]], decode: Callable[[list[int]], str]) -> tuple[str, ...]:
        """The texts that the answers begin with; empty where nothing is repeated. A chat repeats the message that it goes on with."""
        last = self.messages[-1]
        return (last.text,) if self.echo and last.role == "assistant" else ()

    def default_max_output(self, room: int, model_default: int | None = None) -> int:
        """Output tokens where no limit was asked for; ``room``: tokens of the context that the prompt leaves; ``model_default``: what the
        model's own files say."""
        return room if model_default is None else min(room, model_default)

    async def encode(self, encoder: PromptEncoder) -> list[list[int]]:
        """Token ids of each prompt."""
        return [await encoder.chat(self)]

    def tool_rules(self) -> ToolRules | None:
        if not self.tools or self.tool_choice == "none":
            return None
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        names = frozenset(tool.function.name for tool in self.tools)
        parallel = self.parallel_tool_calls is not False
        return ToolRules(names=names, named=named, required=self.tool_choice == "required", parallel=parallel)

    def check(self) -> None:
        _check_common(self)
        _check_chat(self)
        _ = self.guide

    def _forced_call(self) -> GuideSpec | None:
        functions = [tool.function for tool in self.tools or ()]
        if not functions or self.tool_choice in (None, "none", "auto"):
            return None
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return structured_output.arguments_guide(next(function for function in functions if function.name == name))
        return structured_output.call_guide(functions)


class CompletionBody(GenerateBody, frozen=True, kw_only=True):
    """Body of ``/v1/completions``. ``prompt``: text, token ids, or a list of either (then one choice list per prompt, in order)."""

    endpoint: ClassVar[ApiEndpoint] = "completions"
    prompt_field: ClassVar[str] = "prompt"

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.prompt_logprobs is None and self.echo else self.prompt_logprobs

    def echoes(self, prompts: list[list[int]], decode: Callable[[list[int]], str]) -> tuple[str, ...]:
        if not self.echo:
            return ()
        whole = self.truncate_prompt_tokens is None
        return tuple(given if isinstance(given, str) and whole else decode(ids) for given, ids in zip(self.prompts, prompts, strict=True))

    def default_max_output(self, room: int, model_default: int | None = None) -> int:
        return min(room, DEFAULT_COMPLETION_TOKENS)  # OpenAI's API has a default of its own here

    async def encode(self, encoder: PromptEncoder) -> list[list[int]]:
        return [await encoder.prompt(prompt, add_special=self.add_special_tokens is not False) for prompt in self.prompts]

    def check(self) -> None:
        _check_common(self)
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            refuse("logprobs", f"must be between 0 and {MAX_LOGPROBS}, got {self.logprobs}")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            refuse("max_tokens", "must be at least 1, got 0; 0 is for echo and prompt_logprobs")
        if self.suffix:
            refuse("suffix", "filling in the middle is not offered")
        _ = self.prompts, self.guide

    @functools.cached_property
    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt on its own. Raises Rejected on mixed or empty lists and on anything that is not text or token ids."""
        value = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if not isinstance(value, list) or not value:
            refuse("prompt", "a prompt is a non-empty string, a list of token ids, or a list of either")
        # The exact types, because a boolean is no token id; a set of them costs a tenth of a conversion.
        kinds = set(map(type, value))
        prompts: list[str] | list[list[int]] = [value] if kinds == {int} else value
        if kinds not in ({int}, {str}) and not (kinds == {list} and all(set(map(type, ids)) <= {int} for ids in value)):
            refuse("prompt", "a prompt is a string, a list of token ids, or a list of either, not a mixture")
        if len(prompts) > MAX_PROMPTS:
            refuse("prompt", f"{len(prompts)} prompts are more than the {MAX_PROMPTS} that one request may hold")
        if not all(prompts):
            refuse("prompt", "a prompt must not be empty")
        return prompts


Body = ChatBody | CompletionBody
_T = TypeVar("_T")
_B = TypeVar("_B", bound=GenerateBody)
_BODIES: dict[ApiEndpoint, type[ChatBody] | type[CompletionBody]] = {body.endpoint: body for body in (ChatBody, CompletionBody)}


def refuse(param: str | None, why: str, code: str | None = None) -> NoReturn:
    raise Rejected(printable(f"{param}: {why}" if param else why), code=code, param=printable(param) if param else None)


def read(endpoint: ApiEndpoint, fields: dict[str, Any], *, on_unknown: Callable[[list[str]], None] | None = None) -> Body:
    """The checked body of a request to ``endpoint``; see :func:`check`. Raises Rejected."""
    return check(fields, _BODIES[endpoint], on_unknown=on_unknown)


def check(fields: dict[str, Any], kind: type[_B], *, on_unknown: Callable[[list[str]], None] | None = None) -> _B:
    """``fields`` as a body within every limit. ``on_unknown`` is called with the names of the fields that are ignored, where there are
    some. Raises Rejected."""
    if on_unknown is not None and (unknown := known_fields.unknown_fields(fields, kind)):
        on_unknown(unknown)
    if (refused := known_fields.refused_field(fields)) is not None:
        refuse(*refused, code="unsupported")
    body = convert(_with_tools(fields), kind)
    body.check()
    return body


def decode_object(body: bytes | bytearray) -> dict[str, Any]:
    """A JSON object of unique keys, at most MAX_KEYS in any object, nested at most MAX_NESTING deep. Raises Rejected."""
    if not body:
        refuse(None, "the request has no body; a JSON object was expected")
    try:
        found = _JSON.decode(body.decode("utf-8"))
        if b"\\ud" in body or b"\\uD" in body:
            msgspec.json.encode(found)  # refuses a surrogate without its other half, which no tokenizer could take
        if body.count(b"{") + body.count(b"[") > MAX_NESTING and _nesting(found) > MAX_NESTING:
            raise RecursionError
    except RecursionError:
        # Only a schema can be deep for a reason, so the refusal of a body with one names the schema.
        schema = b'"json_schema"' in body or b'"guided_json"' in body or b'"structured_outputs"' in body
        refuse(None, "the JSON is nested too deeply", "invalid_schema" if schema else None)
    except UnicodeError:
        refuse(None, "the body is not valid UTF-8")
    except ValueError as error:
        refuse(None, f"the body is not valid JSON: {str(error)[:120]}")
    if not isinstance(found, dict):
        refuse(None, f"the body must be a JSON object, got {type(found).__name__}")
    return found


def convert(fields: dict[str, Any], kind: type[_T]) -> _T:
    """``fields`` as a struct, without coercion of types. Raises Rejected with the field's name."""
    try:
        return msgspec.convert({name: _with_sent(value) if name in _SENT else value for name, value in fields.items()}, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        path = path.strip("`").lstrip(".")
        if missing := re.fullmatch(r"Object missing required field `([^`]+)`", what):
            refuse(".".join(filter(None, (path, missing[1])))[:MAX_NAME], "this field is required")
        if wrong := re.fullmatch(r"Invalid enum value (.*)", what, re.DOTALL):
            what = f"must be {' or '.join(map(repr, _values(msgspec.inspect.type_info(kind), path)))}, got {wrong[1][:80]}"
        refuse(path[:MAX_NAME] or None, what[:300])


def _values(kind: msgspec.inspect.Type, path: str) -> list[Any]:
    """The values of an enumeration at ``path`` of a type, as msgspec spells it: ``messages[0].role``, ``[...]`` for any key."""
    kinds = [kind]
    for name, index in re.findall(r"(\w+)|\[(\d+|\.\.\.)\]", path):
        kinds = [inner for outer in _alternatives(kinds) for inner in _inner(outer, name, index)]
    return [value for found in _alternatives(kinds) if isinstance(found, msgspec.inspect.LiteralType) for value in found.values]


def _alternatives(kinds: list[msgspec.inspect.Type]) -> list[msgspec.inspect.Type]:
    return [each for kind in kinds for each in (kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,))]


def _inner(kind: msgspec.inspect.Type, name: str, index: str) -> list[msgspec.inspect.Type]:
    """The types of a field, an item or a value of ``kind``."""
    match kind:
        case msgspec.inspect.StructType() if name:
            return [field.type for field in kind.fields if field.encode_name == name]
        case msgspec.inspect.ListType() if index:
            return [kind.item_type]
        case msgspec.inspect.DictType() if index:
            return [kind.value_type]
    return []


def _with_sent(items: Any) -> Any:
    """Each object of a list with itself in its field ``sent``."""
    return [{**item, "sent": item} if isinstance(item, dict) else item for item in items] if isinstance(items, list) else items


def _with_tools(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` of which the older ``functions`` and ``function_call`` are given as tools too: one call at most, as it was with them."""
    functions, call = fields.get("functions"), fields.get("function_call")
    if functions is None and call is None:
        return fields
    if fields.get("tools") is not None or fields.get("tool_choice") is not None:
        refuse("functions" if functions is not None else "function_call", "excludes tools and tool_choice, which have replaced it")
    tools = [{"type": "function", "function": function} for function in functions] if isinstance(functions, list) else None
    choice = {"type": "function", "function": call} if isinstance(call, dict) else call
    # At the end, so that a mistake is reported under the name that the client used.
    return {**fields, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        refuse(None, f"an object has {len(pairs)} keys, more than {MAX_KEYS}")
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                refuse(key[:64], "the key appears twice")
            seen.add(key)
    return found


def _nesting(value: Any) -> int:
    """How deep lists and objects are nested in ``value``, found without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [item for node in level for item in (node.values() if isinstance(node, dict) else node)]
        level = [item for item in inner if isinstance(item, dict | list)]
    return depth


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _check_common(body: GenerateBody) -> None:
    check_model_name(body.model)
    for name in _RANGES:
        value = getattr(body, name, None)
        if value is not None and (fault := range_fault(name, value)) is not None:
            refuse(name, fault)
    if body.best_of is not None and body.best_of != (body.n or 1):
        refuse("best_of", "choosing among more candidates than n is not offered; leave it out or set it to n")
    if body.stream_options is not None and not body.stream:
        refuse("stream_options", "only allowed together with stream")
    limit = body.max_output
    if limit is not None and (body.min_tokens or 0) > limit:
        refuse("min_tokens", f"{body.min_tokens} is more than max_tokens ({limit})")
    if body.prompt_logprobs is not None and body.stream:
        refuse("prompt_logprobs", "not available in a stream")
    if body.truncate_prompt_tokens == 0:
        refuse("truncate_prompt_tokens", "keeps at least one token; -1 keeps what fits")
    _check_stops(body)
    _check_bias(body.logit_bias)
    _check_words(body)
    _check_labels(body)


def range_fault(name: str, value: float) -> str | None:
    """What is wrong with a number of the field ``name``; None = it is within its limits. NaN never is."""
    low, high = _RANGES[name]
    if (value > low if name in _OPEN_BELOW else value >= low) and (high is None or value <= high):
        return None
    return f"must be {'above' if name in _OPEN_BELOW else 'at least'} {_exact(low)} and at most {_exact(high)}, got {_short(value)}"


def _exact(bound: float | None) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def check_model_name(name: str) -> None:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        refuse("model", f"a model name has 1 to {MAX_NAME} printable characters")


def _check_stops(body: GenerateBody) -> None:
    stops = body.stops()
    if len(stops) > MAX_STOPS:
        refuse("stop", f"{len(stops)} stop strings are more than {MAX_STOPS}")
    if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        refuse("stop", f"a stop string has 1 to {MAX_STOP_CHARS} characters")
    if len(body.stop_token_ids or ()) > MAX_STOP_IDS:
        refuse("stop_token_ids", f"more than {MAX_STOP_IDS} ids")


def _check_bias(bias: dict[str, float] | None) -> None:
    if not bias:
        return
    if len(bias) > MAX_BIASES:
        refuse("logit_bias", f"{len(bias)} entries are more than {MAX_BIASES}")
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            refuse("logit_bias", f"{key[:32]!r} is not a token id")
        if not -100.0 <= value <= 100.0:
            refuse("logit_bias", f"{_short(value)} is not between -100 and 100")


def _check_words(body: GenerateBody) -> None:
    if body.allowed_token_ids is not None and not body.allowed_token_ids:
        refuse("allowed_token_ids", "no id at all is allowed; leave it out to allow all")
    words = body.bad_words or []
    if len(words) > MAX_BAD_WORDS:
        refuse("bad_words", f"{len(words)} words are more than {MAX_BAD_WORDS}")
    if any(not word.strip() or len(word) > MAX_BAD_WORD_CHARS for word in words):
        refuse("bad_words", f"a word has 1 to {MAX_BAD_WORD_CHARS} characters, not all of them blank")


def _check_labels(body: GenerateBody) -> None:
    if body.user is not None and len(body.user) > MAX_USER:
        refuse("user", f"longer than {MAX_USER} characters")
    if body.prompt_cache_key is not None and len(body.prompt_cache_key) > MAX_USER:
        refuse("prompt_cache_key", f"longer than {MAX_USER} characters")
    if body.request_id is not None and not _REQUEST_ID.fullmatch(body.request_id):
        refuse("request_id", "an id has 1 to 128 letters, digits or characters of ._:/+=@-")
    if body.metadata is not None and len(msgspec.json.encode(body.metadata)) > MAX_METADATA_BYTES:
        refuse("metadata", f"larger than {MAX_METADATA_BYTES} bytes")
    salt = body.cache_salt
    if salt is not None and not (1 <= len(salt) <= MAX_NAME and salt.isprintable()):
        refuse("cache_salt", f"a salt has 1 to {MAX_NAME} printable characters")


def _short(number: float) -> str:
    """A number for an error text: a number in JSON may have thousands of digits."""
    text = str(number)
    return text if len(text) <= 32 else f"{text[:32]}..."


def _check_chat(body: ChatBody) -> None:
    if not 1 <= len(body.messages) <= MAX_MESSAGES:
        refuse("messages", f"a chat has 1 to {MAX_MESSAGES} messages, got {len(body.messages)}")
    for index, message in enumerate(body.messages):
        if message.content is None and message.role != "assistant":
            refuse(f"messages[{index}].content", f"a {message.role} message needs content")
        if isinstance(message.content, list):
            _check_parts(message.content, f"messages[{index}].content")
        _check_calls(message.tool_calls or (), f"messages[{index}].tool_calls")
    if body.continue_final_message and body.add_generation_prompt:
        refuse("continue_final_message", "excludes add_generation_prompt: the prompt ends within the last message")
    if body.max_output == 0:
        refuse("max_completion_tokens" if body.max_completion_tokens == 0 else "max_tokens", "must be at least 1, got 0")
    if body.top_logprobs is not None and not body.logprobs:
        refuse("top_logprobs", "needs logprobs to be true")
    if body.chat_template is not None:
        refuse("chat_template", "templates belong to the model and are not taken from a request")
    kwargs = body.chat_template_kwargs or {}
    for key in kwargs.keys() & RESERVED_KWARGS:
        refuse("chat_template_kwargs", f"{key!r} is reserved")
    if len(msgspec.json.encode(kwargs)) > MAX_KWARGS_BYTES:
        refuse("chat_template_kwargs", f"larger than {MAX_KWARGS_BYTES} bytes")
    _check_tools(body)


def _check_calls(calls: Sequence[dict[str, Any]], where: str) -> None:
    """A call without a function would leave the prompt without a word."""
    for index, call in enumerate(calls):
        kind, function = call.get("type", "function"), call.get("function")
        if kind != "function":
            refuse(f"{where}[{index}].type", f"a call of type {_short(kind)} is not taken, only function is")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            refuse(f"{where}[{index}].function", "a call has the name and the arguments of a function")


def _check_parts(parts: list[ContentPart], where: str) -> None:
    for index, part in enumerate(parts):
        if part.type not in PART_TYPES:
            shown = printable(part.type[:MAX_NAME])
            refuse(f"{where}[{index}].type", f"a part of type {shown!r} is not taken, only text is (type {', '.join(PART_TYPES)})")
        if not part.is_text:
            refuse(f"{where}[{index}]", f"a part of type {part.type!r} has no text")


def _check_tools(body: ChatBody) -> None:
    older = body.functions is not None or body.function_call is not None
    tools, tool_choice = ("functions", "function_call") if older else ("tools", "tool_choice")
    names = [tool.function.name for tool in body.tools or ()]
    if len(names) > MAX_TOOLS:
        refuse(tools, f"{len(names)} tools are more than {MAX_TOOLS}")
    if len(set(names)) != len(names):
        refuse(tools, "two tools have the same name")
    if any(not _TOOL_NAME.fullmatch(name) for name in names):
        refuse(tools, "a tool name has 1 to 64 letters, digits, dots, dashes or underscores")
    choice = body.tool_choice
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        refuse(tool_choice, f"no tool is named {choice.function.name[:64]!r}")
    if choice is not None and not names and (older or choice == "required"):
        refuse(tool_choice, f"needs {tools}")
