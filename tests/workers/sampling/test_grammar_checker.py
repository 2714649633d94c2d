"""Grammars that would end or stop the process that compiles them: tried elsewhere first, refused, and the next one works."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.tiny_models import IM_END, tiny_tokenizer
from workers.protocol.errors import Rejected, Unsupported
from workers.protocol.messages import GuideSpec
from workers.sampling.grammar_checker import GrammarChecker, Tokenizer, compiler
from workers.sampling.guide import GuideFactory

VOCAB = 320
COUNT = 4000
GOOD = GuideSpec(kind="choice", text='["yes","no"]')
#: A compiler that recurses once a rule runs out of stack.
DEEP = GuideSpec(kind="grammar", text="start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(COUNT)) + f'r{COUNT}: "a"\n')
#: Each pattern more multiplies the states of their intersection.
LONG = GuideSpec(
    kind="json_schema",
    text='{"allOf":[' + ",".join(f'{{"type":"string","pattern":".*{chr(97 + i % 26) * (i // 26 + 1)}.*"}}' for i in range(60)) + "]}",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json"


@pytest.fixture(scope="module")
def compile_guide(tokenizer: Path) -> GuideFactory:
    found = compiler(tokenizer, VOCAB, (IM_END,))
    assert found is not None
    return found


@pytest.mark.parametrize("spec", [DEEP, LONG], ids=["deep", "long"])
def test_what_would_end_or_stop_the_leader_is_the_callers_fault(compile_guide: GuideFactory, spec: GuideSpec) -> None:
    for _ in range(2):  # the second time from memory
        with pytest.raises(Rejected) as caught:
            compile_guide(spec)
        assert caught.value.code == "invalid_schema" and "too much" in caught.value.why
    guide = compile_guide(GOOD)
    guide.advance(list(b"no"))
    assert guide.done()


def test_what_a_grammar_means_is_still_said_by_the_compiler(compile_guide: GuideFactory) -> None:
    with pytest.raises(Rejected) as caught:
        compile_guide(GuideSpec(kind="regex", text="("))
    assert caught.value.code == "invalid_schema" and "too much" not in caught.value.why


def test_a_child_that_is_gone_is_replaced(tokenizer: Path) -> None:
    checker = GrammarChecker(Tokenizer(str(tokenizer), VOCAB, [IM_END]))
    assert checker.child is None, "no guided request, no process"
    checker.check(GOOD)
    first = checker.child
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    first.wait(10)
    checker.check(GuideSpec(kind="regex", text="a+"))
    second = checker.child
    assert second is not None and second.pid != first.pid
    del checker
    assert second.wait(10) == -signal.SIGKILL, "its owner gone, the child is gone"


def test_a_tokenizer_that_is_none_is_said_when_a_guide_is_asked_for(tmp_path: Path) -> None:
    assert compiler(tmp_path / "tokenizer.json", VOCAB, (IM_END,)) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    found = compiler(tmp_path / "tokenizer.json", VOCAB, (IM_END,))
    assert found is not None
    with pytest.raises(Unsupported, match="not offered"):
        found(GOOD)
