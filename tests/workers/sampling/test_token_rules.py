"""Rules about single ids: ``allowed_token_ids`` and ``bad_words``, against a definition by brute force."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.support.examples import examples
from tests.support.scheduler_rig import EOS, Rig, capacity, submit
from tests.support.table_guide import table_guides
from workers.protocol.engine import Finish
from workers.protocol.errors import Rejected
from workers.protocol.messages import GuideSpec, SamplingParams
from workers.sampling.definition import allowed_ids, check, has_mask
from workers.sampling.token_rules import TokenRules

VOCAB = 37
WORDS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple), max_size=4).map(tuple)


def ids_of(rules: TokenRules, vocab: int = VOCAB) -> set[int]:
    mask = rules.mask()
    assert len(mask) == -(-vocab // 32) * 4
    return {id for id, allowed in enumerate(allowed_ids(mask, vocab)) if allowed}


@given(st.none() | st.sets(st.integers(0, 5), min_size=1).map(tuple), WORDS, st.lists(st.integers(0, 5), max_size=9))
@settings(max_examples=examples(150), deadline=None)
def test_what_may_follow_an_output(allowed: tuple[int, ...] | None, words: tuple[tuple[int, ...], ...], output: list[int]) -> None:
    """As vLLM defines a bad word: its last id may not follow the others, wherever in the output."""
    rules = TokenRules(SamplingParams(allowed_token_ids=allowed, bad_words=words), VOCAB, EOS, None)
    for end in range(len(output) + 1):
        so_far = tuple(output[:end])
        expected = {
            id
            for id in (range(VOCAB) if allowed is None else allowed)
            if not any((*so_far, id)[len(so_far) + 1 - len(word) :] == word for word in words if len(word) <= len(so_far) + 1)
        }
        assert ids_of(rules) == expected
        assert rules.done() == (not expected)
        rules.advance(output[end : end + 1])


def test_rules_and_a_grammar_hold_together() -> None:
    params = SamplingParams(bad_words=(tuple(b"ab"),), guide=GuideSpec(kind="choice", text='["ab", "ac"]'))
    rules = TokenRules(params, 320, EOS, table_guides(params.guide))  # type: ignore[arg-type]
    rules.advance(list(b"a"))
    assert ids_of(rules, 320) == {ord("c")}
    rules.advance(list(b"c"))
    assert rules.done()


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_sequence_keeps_its_rules_over_a_restart(async_scheduling: bool) -> None:
    rig = Rig(capacity(), async_scheduling=async_scheduling)
    free = rig.submit(submit([1, 2, 3], SamplingParams(max_tokens=6)))
    one = rig.submit(submit([1, 2, 3], SamplingParams(max_tokens=12, allowed_token_ids=(65, 66, 67), bad_words=((65, 66), (67,)))))
    for _ in range(5):
        rig.step()
    assert 0 < len(rig.streams[one].tokens) < 12
    rig.restart()
    rig.finish(one)
    rig.finish(free)
    rig.verify()
    answer = bytes(rig.streams[one].tokens)
    assert set(answer) <= set(b"AB") and b"AB" not in answer


def test_an_output_that_nothing_may_follow_is_whole() -> None:
    """Not an engine fault: the rules leave no token, with ``min_tokens`` or without."""
    rig = Rig(capacity())
    stuck = rig.submit(submit([1], SamplingParams(max_tokens=9, allowed_token_ids=(65,), bad_words=((65, 65),))))
    never = rig.submit(submit([1], SamplingParams(max_tokens=9, min_tokens=2, allowed_token_ids=(EOS[0],))))
    for id, tokens in ((stuck, [65]), (never, [])):
        rig.finish(id)
        end = rig.streams[id].end
        assert isinstance(end, Finish) and end.reason == "stop" and rig.streams[id].tokens == tokens


def test_rules_need_a_mask_and_known_ids() -> None:
    assert (
        has_mask(SamplingParams(bad_words=((1,),))) and has_mask(SamplingParams(allowed_token_ids=(1,))) and not has_mask(SamplingParams())
    )
    for params in (
        SamplingParams(allowed_token_ids=()), SamplingParams(allowed_token_ids=(VOCAB,)), SamplingParams(allowed_token_ids=(-1,)),
        SamplingParams(bad_words=((),)), SamplingParams(bad_words=((1, VOCAB),)), SamplingParams(bad_words=((1,),) * 9000),
    ):  # fmt: skip
        with pytest.raises(Rejected) as caught:
            check(params, vocab_size=VOCAB, max_logprobs=20)
        assert caught.value.param in ("allowed_token_ids", "bad_words")
