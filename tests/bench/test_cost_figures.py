"""The benches that print a cost of one process run, and what they drive does what they count. The figures are not judged here."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench import rpc_token, scheduler_step
from tests.support.tiny_models import tiny_tokenizer


@pytest.mark.parametrize("texts", [False, True])
def test_a_step_is_one_message_to_each_rpc_client(tmp_path: Path, texts: bool) -> None:
    """The bench asserts it, and the tokens and texts in the last message."""
    tiny_tokenizer(tmp_path)
    assert asyncio.run(rpc_token.measure(tmp_path, texts, steps=20)) > 0.0


def test_a_step_of_the_scheduler() -> None:
    assert scheduler_step.measure(sequences=64, steps=20) > 0.0
