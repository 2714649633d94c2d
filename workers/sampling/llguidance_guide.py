"""Grammars with llguidance: compiles a request's grammar and advances one matcher per sequence.

Owns the tokenizer's trie, shared by all matchers of a process. Must never wait: llguidance's own limits and the size of the text bound the
compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import llguidance
import msgspec

from workers.protocol.errors import ArtifactError, EngineFault, Rejected
from workers.protocol.messages import GuideSpec
from workers.sampling.guide import Guide

#: Longest grammar text, bytes, and most choices.
MAX_TEXT = 64 << 10
MAX_CHOICES = 1024
#: Default white space between two tokens of JSON: a space, or a new line and its indent. Without a bound, a small model may write white
#: space until ``max_tokens``.
WHITESPACE = r" |\n {0,16}"


class LlGuide:
    """The matcher of one sequence, over ``vocab_size`` ids (the model's, which may be more than the tokenizer's)."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int) -> None:
        self._matcher, self._words = matcher, words

    def mask(self) -> bytes:
        """See :class:`workers.sampling.guide.Guide`; ids that the tokenizer lacks are never allowed. If a grammar has become too large to
        follow, only the end is allowed, which :meth:`advance` then refuses."""
        found: bytes = self._matcher.compute_bitmask()
        return found[: 4 * self._words].ljust(4 * self._words, b"\0")

    def advance(self, tokens: Sequence[int]) -> None:
        if not self._matcher.consume_tokens(list(tokens)):
            raise EngineFault("the grammar does not allow a token", self._matcher.get_error().splitlines()[0][:200])

    def done(self) -> bool:
        return bool(self._matcher.is_stopped())


def _grammar(spec: GuideSpec) -> str:
    """``spec`` in llguidance's format. Raises Rejected for a schema or a list of choices that is not JSON."""
    try:
        if spec.kind == "json":
            return _json_grammar('{"type": "object"}', spec.whitespace)
        if spec.kind == "json_schema":
            return _json_grammar(spec.text, spec.whitespace)
        if spec.kind == "regex":
            # Character classes are ASCII, like llguidance's in a schema's pattern.
            return str(llguidance.LLMatcher.grammar_from_regex(llguidance.regex_to_lark(spec.text, "dws")))
        if spec.kind == "grammar":
            return str(llguidance.LLMatcher.grammar_from_lark(spec.text))
        choices = msgspec.json.decode(spec.text, type=list[str])
    except (ValueError, msgspec.DecodeError) as error:
        raise _invalid(spec, str(error)) from None
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise _invalid(spec, f"{len(choices)} choices; 1 to {MAX_CHOICES} are possible")
    alternatives = " | ".join(msgspec.json.encode(choice).decode() for choice in choices)
    return str(llguidance.LLMatcher.grammar_from_lark(f"start: {alternatives}"))


def _json_grammar(schema: str, whitespace: str | None) -> str:
    """A schema may define white space itself, in ``x-guidance``; a request's setting overrides it."""
    defaults = {"whitespace_pattern": WHITESPACE}
    overrides = None if whitespace is None else {"whitespace_flexible": bool(whitespace), "whitespace_pattern": whitespace or None}
    return str(llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=defaults, overrides=overrides))


def _invalid(spec: GuideSpec, why: str) -> Rejected:
    """``why``: the compiler's words. The other lines of them show where in its own form of the grammar the mistake stands."""
    lines = why.strip().splitlines() or [""]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return Rejected(f"the {spec.noun} cannot be followed", line[:300], "correct it or ask for less", code="invalid_schema", param="guide")


def check_grammar(spec: GuideSpec) -> None:
    """Compile ``spec`` without a tokenizer. Raises Rejected for an invalid one."""
    if fault := llguidance.LLMatcher.validate_grammar(_grammar(spec)):
        raise _invalid(spec, fault)


def guide_factory(tokenizer_file: Path, vocab_size: int, eos_ids: Sequence[int]) -> Callable[[GuideSpec], Guide]:
    """A :data:`~workers.sampling.guide.GuideFactory` for ``tokenizer.json``. Raises ArtifactError if the file is not a tokenizer."""
    try:
        # Only the first end-of-sequence id: releases before 1.7 accept no list, and one id is enough.
        tokenizer = llguidance.LLTokenizer(tokenizer_file.read_text(), eos_token=eos_ids[0] if eos_ids else None)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{tokenizer_file} cannot be used for guided output", str(error)[:300]) from None
    words = -(-vocab_size // 32)

    def compile_guide(spec: GuideSpec) -> Guide:
        if len(spec.text) > MAX_TEXT:
            raise _invalid(spec, f"it has {len(spec.text)} characters; {MAX_TEXT} are the limit")
        matcher = llguidance.LLMatcher(tokenizer, _grammar(spec), log_level=0)
        # The automaton is built lazily: the first mask shows whether it is too large from the start.
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _invalid(spec, matcher.get_error())
        return LlGuide(matcher, words)

    return compile_guide
