"""Chat templates: messages in, prompt pieces out.

Owns the Jinja sandbox (immutable, no attribute access to Python; what transformers offers to templates) and the rule that text from a
request never becomes a control token: where a string of a request contains the text of a special token, that text is masked while the
template is rendered and becomes plain text again afterwards. It never reads a file, and never renders a template that came with a request.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orchestrator.router.frontend.chat_turns import REASONING_KEYS, ContentForm, content_in, to_json, turns_of
from orchestrator.router.frontend.template_cost import MAX_SOURCE, is_bounded
from orchestrator.router.frontend.template_reads import TemplateReads, what_it_reads
from workers.protocol.errors import ArtifactError, Rejected

#: Characters that a rendered prompt may have; four times what the largest body can hold.
MAX_RENDERED = 16 << 20
#: The names of a model's templates that are used without a request for them.
DEFAULT, TOOL_USE = "default", "tool_use"

# Unicode reserves these noncharacters for a program's own use. If a request contains one that means something here, it is masked.
_OPEN, _CLOSE, _CUT = "\ufdd0", "\ufdd1", "\ufdd2"
#: Marks the end of the message to continue. Its blank shows whether the template keeps the white space there.
_END_OF_MESSAGE = f"{_CUT} "
_UNREADABLE = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)
_REFUSED = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)
_TRIAL = [("system", "Trial one."), ("user", "Trial two."), ("assistant", "Trial three."), ("user", "Trial four.")]


class PromptPiece(msgspec.Struct, frozen=True):
    """A part of a prompt. ``exact``: the text is encoded as plain text; otherwise special tokens in it are encoded as such."""

    text: str
    exact: bool


class TemplateFile(msgspec.Struct, frozen=True, kw_only=True):
    """A template and its origin (a file's path, for errors)."""

    source: str
    origin: str


class TemplateSource(msgspec.Struct, frozen=True, kw_only=True):
    """The templates that came with a model, by name, not yet compiled: to compile one may take as long as to render it.

    ``specials``: texts of the control tokens; ``tokens``: bos_token and such, given to the templates.
    """

    templates: dict[str, TemplateFile]
    specials: tuple[str, ...]
    tokens: dict[str, str]

    def compile(self) -> ChatTemplate:
        """Raises ArtifactError with the file and the line of the first mistake."""
        return ChatTemplate(self)

    def compile_bounded(self) -> ChatTemplate | None:
        """:meth:`compile`, but None where a template may cost more than :mod:`orchestrator.router.frontend.template_cost` allows, also to
        compile it, and where one has a mistake."""
        files = self.templates.values()
        try:
            bounded = all(len(file.source) <= MAX_SOURCE and is_bounded(_environment().parse(file.source)) for file in files)
            return self.compile() if bounded else None
        except (jinja2.TemplateSyntaxError, ArtifactError, *_UNREADABLE):
            return None


class ChatTemplate:
    """One model's templates, compiled: for each of its names one, of which a request with tools takes ``tool_use``."""

    def __init__(self, model: TemplateSource) -> None:
        self._tokens = model.tokens
        specials = [text for text in model.specials if text]
        self._special = re.compile(_any_of(specials))
        self._named = {name: _Compiled(file, specials, model.tokens) for name, file in model.templates.items()}

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        reasoning_effort: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[PromptPiece]:
        """The prompt as pieces in order: one piece, unless the request's text contains the text of a special token. Raises Rejected.

        ``messages`` and ``tools`` are checked, and otherwise as the client sent them. ``continue_final_message``: the prompt ends within
        the last message. ``reasoning_effort``: for the template's variable of this name, refused where it reads none.
        """
        template = self._choose(bool(tools))
        if reasoning_effort is not None:
            if not template.reads.reasoning_effort:
                what = "reasoning_effort: the model's chat template does not read it"
                raise Rejected(what, hint="leave it out", code="unsupported", param="reasoning_effort")
            kwargs = {**(kwargs or {}), "reasoning_effort": reasoning_effort}
        mask = _Mask()
        turns = [template.hide(mask, turn) for turn in turns_of(messages, tools or [], template.reads)]
        last = _mark_end(turns[-1]) if continue_final_message else ""
        for turn in turns:
            if "content" in turn:
                turn["content"] = content_in(template.form, turn["content"], shape=template.reads.shape)
        given = mask.hide({"tools": tools or None, "documents": documents, **(kwargs or {})}, template.hidden)
        given = {"add_generation_prompt": add_generation_prompt, **self._tokens, **given, "messages": turns}
        try:
            text = _bounded(template.compiled.generate(given))
        except _REFUSED as error:
            raise Rejected(f"messages: the chat template refused them: {str(error)[:200]}", param="messages") from None
        if continue_final_message:
            text = _cut(text, last)
        if not mask.hidden:
            return [PromptPiece(text, False)]
        return [piece for piece in self._unmask(text, mask) if piece.text]

    def _choose(self, tools: bool) -> _Compiled:
        if tools and TOOL_USE in self._named:
            return self._named[TOOL_USE]
        if DEFAULT in self._named:
            return self._named[DEFAULT]
        names = ", ".join(sorted(self._named))
        raise Rejected("messages: the model has no chat template for them", f"it has {names}, and no {DEFAULT}", param="messages")

    def _unmask(self, text: str, mask: _Mask) -> Iterable[PromptPiece]:
        end = 0
        for match in self._special.finditer(text):
            yield PromptPiece(mask.show(text[end : match.start()]), True)
            yield PromptPiece(match[0], False)
            end = match.end()
        yield PromptPiece(mask.show(text[end:]), True)


class _Compiled:
    """One template. ``hidden``: what is masked in a request's strings.

    The text of an assistant's turn is a model's: there a text that the template looks for (``</think>``, to cut old reasoning) stays.
    """

    def __init__(self, file: TemplateFile, specials: list[str], tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self._tokens = tokens
        try:
            tree = environment.parse(file.source)
            self.reads: TemplateReads = what_it_reads(tree, tokens)
            self.compiled = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise _broken(file, f"line {error.lineno}: {error.message}") from None
        except _UNREADABLE as error:
            raise _broken(file, f"{type(error).__name__}: {str(error)[:200]}") from None
        self.hidden = re.compile(_any_of([*specials, _OPEN, _CUT]))
        kept = [text for text in self.reads.searched if any(special in text for special in specials)]
        self._hidden_in_answers = re.compile(f"(?P<kept>{_any_of(kept)})|{self.hidden.pattern}")

    @functools.cached_property
    def form(self) -> ContentForm:
        """The form in which contents are given: the one that the syntax tree suggests, unless a trial shows more texts in another one.

        A template has more ways to a value than the tree shows (``message.items()``, a variable as key, a range of indices), and a text
        that is given in the wrong form is left out of the prompt without an error.
        """
        suggested: ContentForm = "either" if self.reads.parts else "text"
        forms: tuple[ContentForm, ...] = (suggested, "text", "either", "parts")
        return max(dict.fromkeys(forms), key=self._texts_shown)  # of equal ones the first

    def _texts_shown(self, form: ContentForm) -> int:
        """How many texts of two trial conversations the prompts show; none of one that is refused, or that shows a part as a whole."""
        shown = 0
        for trial in (_TRIAL, _TRIAL[1:2]):
            turns = [{"role": role, "content": content_in(form, text, shape=self.reads.shape)} for role, text in trial]
            try:
                prompt = _bounded(self.compiled.generate({"add_generation_prompt": True, **self._tokens, "messages": turns}))
            except (*_REFUSED, Rejected):
                continue
            if "'type'" not in prompt:
                shown += sum(text in prompt for _, text in trial)
        return shown

    def hide(self, mask: _Mask, turn: dict[str, Any]) -> dict[str, Any]:
        own = frozenset(("content", *REASONING_KEYS)) if turn["role"] == "assistant" else frozenset[str]()
        return {
            mask.hide(key, self.hidden): mask.hide(value, self._hidden_in_answers if key in own else self.hidden)
            for key, value in turn.items()
        }


class _Mask:
    """Replaces texts in a request's strings by placeholders that no template uses, and restores them after rendering."""

    def __init__(self) -> None:
        self.hidden: list[str] = []

    def hide(self, value: Any, hidden: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return hidden.sub(self._placeholder, value)
        if isinstance(value, dict):
            return {self.hide(key, hidden): self.hide(item, hidden) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, hidden) for item in value]
        return value

    def show(self, text: str) -> str:
        return re.sub(rf"{_OPEN}(\d+){_CLOSE}", lambda match: self.hidden[int(match[1])], text)

    def _placeholder(self, match: re.Match[str]) -> str:
        if match.lastgroup == "kept":
            return match[0]
        self.hidden.append(match[0])
        return f"{_OPEN}{len(self.hidden) - 1}{_CLOSE}"


class _Generation(Extension):
    """``{% generation %}`` marks what a model is trained on; for a prompt it is a block like any other."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own way to declare it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for any of the texts, longer ones first; without texts it matches nothing."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _mark_end(turn: dict[str, Any]) -> str:
    """Put the mark at the end of a message's text (of its last part); returns that text. Raises Rejected where it has none."""
    content = turn.get("content")
    if isinstance(content, str):
        turn["content"] = content + _END_OF_MESSAGE
        return content
    if isinstance(content, list) and content:
        text: str = content[-1]["text"]
        turn["content"] = [*content[:-1], {**content[-1], "text": text + _END_OF_MESSAGE}]
        return text
    raise Rejected("continue_final_message: the last message has no content to continue", param="continue_final_message")


def _cut(text: str, last: str) -> str:
    """The prompt up to the mark. Where the template trimmed the message, the message ends without white space. Raises Rejected where the
    template changed the text of the message, ``last``, or left it out."""
    end = text.rfind(_CUT)
    if end < 0 or last.strip() not in text:
        why = "the chat template changes its text or leaves it out"
        raise Rejected("continue_final_message: the last message cannot be continued", why, param="continue_final_message")
    return text[:end] if text.startswith(_END_OF_MESSAGE, end) else text[:end].rstrip()


def _bounded(parts: Iterable[str]) -> str:
    """All parts joined. Raises Rejected as soon as they are too long together."""
    kept, size = [], 0
    for part in parts:
        size += len(part)
        if size > MAX_RENDERED:
            raise Rejected(f"messages: the rendered prompt has more than {MAX_RENDERED} characters", param="messages")
        kept.append(part)
    return "".join(kept)


def _broken(file: TemplateFile, why: str) -> ArtifactError:
    return ArtifactError(f"the chat template in {file.origin} cannot be compiled", why, "fix it, or name another one (chat_template)")


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
