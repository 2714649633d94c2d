"""The stream table, case by case. Any order of events: tests/property/test_stream_table.py."""

from __future__ import annotations

from workers.protocol.engine import Emission
from workers.protocol.messages import Attach, GenerateTask, SamplingParams, Submit, Tokens
from workers.serving.stream_table import Action, SendToRouter, StreamTable


def told(actions: list[Action]) -> list[tuple[list[list[int]], list[tuple[int, int]] | None]]:
    """(tokens, prefix hits) of every Tokens message."""
    messages = [action.message for action in actions if isinstance(action, SendToRouter)]
    return [(message.tokens, message.cached) for message in messages if isinstance(message, Tokens)]


def test_a_prefix_hit_goes_with_the_first_token_and_to_every_router_that_attaches() -> None:
    table = StreamTable(boot="me", model="m")
    for stream, name in ((1, "x"), (2, "y")):
        task = GenerateTask(params=SamplingParams())
        table.submit(
            Submit(boot="a", stream=stream, attempt=1, client="c", request_id=name, model="m", prompt_ids=[1] * 40, task=task), 0.0
        )
    assert told(table.emitted([Emission(1, 0, [5], cached_tokens=32), Emission(2, 0, [6])])) == [([[5], [6]], [(1, 32)])]
    assert told(table.emitted([Emission(1, 1, [7])])) == [([[7]], None)]
    table.router_lost("a", 1.0)
    back = [
        told(table.attach(Attach(boot="b", stream=stream, attempt=2, client="c", request_id=name, have=2 - stream)))
        for stream, name in ((1, "x"), (2, "y"))
    ]
    assert back == [[([], [(1, 32)]), ([[7]], None)], [([[6]], None)]]
