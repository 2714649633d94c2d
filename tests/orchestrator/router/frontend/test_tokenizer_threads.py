"""A long text is encoded beside other threads, which is what the event loop is."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from orchestrator.router.frontend.chat_template import PromptPiece
from orchestrator.router.frontend.tokenizer import load
from tests.support.tiny_models import tiny_tokenizer


def test_a_long_text_holds_no_other_thread(tmp_path: Path) -> None:
    """The other thread makes progress while the encoding runs; code that holds the interpreter's lock would stop it for all that time."""
    tiny_tokenizer(tmp_path)
    table = load(str(tmp_path)).table
    over = threading.Event()
    text = "one more word and 1 1 1 \U0001f600 " * 20_000
    found: list[list[int]] = []

    def encode() -> None:
        found.append(table.encode([PromptPiece(text, False)], False))
        over.set()

    thread = threading.Thread(target=encode)
    longest, begun = 0.0, time.monotonic()
    thread.start()
    last = begun
    while not over.is_set():
        time.sleep(0.001)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    thread.join()
    assert table.join(found[0]).decode() == text
    assert longest < (last - begun) * 0.7, f"it stood {longest:.2f} of {last - begun:.2f} s"
