"""Words that readers stumble over: comments, docstrings, messages and pages of documentation do without them.

Owns the list. A word is in it if a sentence of this tree needed a second reading because of it, and if it has a plain replacement. A word
with a common plain meaning is not in it: the check has to pass on ordinary English.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.support.source_tree import ROOT

#: What a sentence must not say, and what it says instead.
INSTEAD = {
    "as ever": "as usual",
    "as everywhere": "as in ..., with the place",
    "asked of": "sent to",
    "became of": "the result of",
    "cannot be true": "is invalid",
    "dealt": "distributed",
    "foretell": "predict",
    "foretells": "predicts",
    "foretold": "predicted",
    "gets on": "makes progress",
    "get on with": "make progress with",
    "given up": "released, dropped, or lost",
    "go on with": "continue",
    "got on": "made progress",
    "held to": "compared with",
    "in silence": "silently",
    "in the making": "being made",
    "in turns": "alternately",
    "in vain": "without success",
    "look at itself": "check itself",
    "looks at itself": "checks itself",
    "may yet": "may still",
    "mend": "fix",
    "mended": "fixed",
    "mends": "fixes",
    "of late": "recently",
    "speak for": "send messages for",
    "speaks for": "sends messages for",
    "stand in for": "replace",
    "stands in for": "replaces",
    "tells of": "reports",
    "the one before": "the previous one",
    "to be had": "available",
    "told to": "ordered to",
    "what becomes of": "the result of",
    "what came of": "the result of",
}

FOLDERS = ("orchestrator", "workers", "trireme", "tests", "bench", "examples", "deploy", "docs")
#: The strings of these are read by users. Strings of tests and benchmarks are often data.
SPOKEN = ("orchestrator", "workers", "trireme")
#: A space in a phrase may be the end of a line, and the next line may begin a comment.
GAP = r"(?:\s|#)+"
FOUND = re.compile(
    r"(?<![\w`/.-])(?:" + "|".join(word.replace(" ", GAP) for word in sorted(INSTEAD, key=len, reverse=True)) + r")(?![\w`/-])"
)


def prose(source: str, strings: bool) -> list[tuple[int, int]]:
    """Where the comments and docstrings of Python source begin and end, as offsets; with ``strings`` all string literals too."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    spans, opens_statement = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_string = token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE"
        if token.type == tokenize.COMMENT or (is_string and (strings or opens_statement)):
            (first, column), (last, end) = token.start, token.end
            spans.append((starts[first - 1] + column, starts[last - 1] + end))
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            opens_statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
    return spans


def complaints(text: str, name: str, strings: bool = False) -> Iterator[str]:
    """One line ``name:line: 'word': say 'instead'`` for each listed word in the sentences of ``text``.

    Args:
        text: Python source if ``name`` ends in ``.py``, else a page of which all but its inline code is read.
        name: the file's name.
        strings: whether string literals are sentences too.
    """
    plain = " ".join(text.lower().replace("#", " ").split())
    if not any(word in plain for word in INSTEAD):
        return  # Most files end here, in a tenth of the time that the tokenizer takes.
    spans = prose(text, strings) if name.endswith(".py") else [(0, len(text))]
    for found in FOUND.finditer(text.lower()):
        if any(begin <= found.start() < end for begin, end in spans):
            word = re.sub(GAP, " ", found[0])
            yield f"{name}:{text.count(chr(10), 0, found.start()) + 1}: {word!r}: say {INSTEAD[word]!r}"


def files() -> list[Path]:
    """Python files and pages of the tree."""
    inside = [path for folder in FOLDERS for kind in ("*.py", "*.md") for path in (ROOT / folder).rglob(kind)]
    return sorted(path for path in [*inside, *ROOT.glob("*.md")] if path != Path(__file__))


def test_sentences_say_it_plainly() -> None:
    found: list[str] = []
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        found += complaints(path.read_text(), name, strings=name.startswith(SPOKEN))
    assert not found, "\n".join(["words of tests/test_words.py:", *found])


def test_only_sentences_are_read() -> None:
    source = '"""It looks in\nvain."""\nof_late = ["in vain"]  # of\n# late\nvalue = f"in vain {of_late}"\n'
    assert list(complaints(source, "a.py")) == ["a.py:1: 'in vain': say 'without success'", "a.py:3: 'of late': say 'recently'"]
    assert len(list(complaints(source, "a.py", strings=True))) == 4
    assert list(complaints("It foretells `in vain` a file of lateness.\n", "a.md")) == ["a.md:1: 'foretells': say 'predicts'"]
