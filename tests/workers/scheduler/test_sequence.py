"""A sequence alone: who writes to it, what its credit and its length allow."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import workers.scheduler.sequence
from tests.support.scheduler_rig import capacity, submit
from workers.protocol.messages import UNLIMITED, SamplingParams
from workers.scheduler.block_pool import BlockPool
from workers.scheduler.sequence import PrefixCursor, Sequence, make_sequence

OWNER = Path(workers.scheduler.sequence.__file__)
FIELDS = {field.name for kind in (Sequence, PrefixCursor) for field in dataclasses.fields(kind)}
MUTATORS = {"append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse"}


def writes(source: str) -> list[str]:
    """Places where ``source`` writes to a field of a sequence that it was given: ``line: field``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = [each for target in node.targets for each in (target.elts if isinstance(target, ast.Tuple) else [target])]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            targets = [node.func.value]
        for target in targets:
            if isinstance(target, ast.Attribute) and target.attr in FIELDS and ast.unparse(target.value) != "self":
                found.append(f"{node.lineno}: {target.attr}")
    return found


@pytest.mark.parametrize("path", [path for path in sorted(OWNER.parent.glob("*.py")) if path != OWNER], ids=lambda path: path.stem)
def test_only_its_own_module_writes_to_a_sequence(path: Path) -> None:
    assert writes(path.read_text()) == []


@pytest.mark.parametrize("line", ["seq.computed += 1", "seq.slot, x = 1, 2", "seq.tokens.append(3)", "seq.prefix.publish_at = 0"])
def test_a_planted_write_is_found(line: str) -> None:
    assert len(writes(line)) == 1


def sequence(max_tokens: int = 8, credit: int = UNLIMITED, **settings: object) -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, **settings)  # type: ignore[arg-type]
    return make_sequence(0, 0, submit([65] * 20, params, credit=credit), capacity(), (), None)


def test_credit_and_length_bound_how_far_a_sequence_is_scheduled_without_its_tokens() -> None:
    seq = sequence(max_tokens=8, credit=3)
    assert (seq.credit, seq.allowed_len, seq.max_len) == (3, 23, 28)
    assert seq.async_until == 22, "the token that uses up the credit must be seen"
    seq.add_credit(UNLIMITED)
    assert seq.credit == UNLIMITED and seq.async_until == 27, "the last token must be seen"
    assert sequence(repetition_penalty=1.3).async_until == 0, "the next choice depends on the token"


def test_tokens_are_plain_once_the_prompt_is_published() -> None:
    pool = BlockPool(64, 8)
    seq = sequence()
    seq.admit(0, [], pool.allocate(3) or [], pool)
    assert seq.plain_until == 0, "two blocks of the prompt are to be published"
    seq.schedule_chunk(20)
    workers.scheduler.sequence.add_counts([seq], scheduled=0, computed=20)
    seq.publish(pool)
    assert seq.plain_until == seq.max_len - 1
    seq.finish()
    assert seq.plain_until == 0
    assert seq.give_up_slot(pool) == 0 and not seq.blocks and pool.available == 64
