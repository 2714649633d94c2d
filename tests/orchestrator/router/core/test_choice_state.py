"""The state of a request and of its choices: what is worked out from it, and its snapshots. Its transitions: test_request_table.py."""

from __future__ import annotations

from math import inf
from typing import Any

from orchestrator.router.core.choice_state import ChoiceSnapshot, ChoiceState, RequestState
from orchestrator.router.core.events import SubmitRequest
from orchestrator.router.core.fair_order import TenantAccount
from orchestrator.router.core.replica_registry import ReplicaRegistry
from orchestrator.router.core.stats import Attempt
from tests.support.router_core import HELLO, ask
from workers.protocol.messages import (
    UNLIMITED,
)
from workers.scheduler.block_pool import prefix_hashes


def request(**change: Any) -> RequestState:
    """A live request of the prompt 1, 2, 3, with changes."""
    return RequestState(SubmitRequest(id=7, request=ask(**change), session=""), TenantAccount("t", 1), 1.0, inf)


def choice_of(owner: RequestState, emitted: list[int], index: int = 0) -> ChoiceState:
    return ChoiceState(owner, 70 + index, index, owner.spec.params, emitted)


def test_a_choice_counts_its_credit_from_where_its_client_stood() -> None:
    choice = choice_of(request(credit=4), [5, 6])
    assert (choice.phase, choice.resumed_from, choice.credit) == ("queued", 2, 4), "what the client has already costs nothing"
    choice.emitted += [7, 8, 9]
    assert choice.credit == 1
    choice.granted = UNLIMITED
    assert choice.credit == UNLIMITED


def test_a_replica_must_compute_the_prompt_and_all_that_was_emitted() -> None:
    choice = choice_of(request(), [5, 6], index=2)
    assert choice.known == 3 + 2 and choice.name == "q/2"


def test_a_request_names_its_callers_id_only_where_it_differs() -> None:
    assert request(marks=("from-a-header", "")).caller_id == "from-a-header"
    assert request(marks=("q", "")).caller_id == ""


def test_prefix_hashes_are_those_of_the_replicas_cache() -> None:
    owner = request(prompt=list(range(40)), salt="tenant")
    assert owner.prompt_hashes(16) == prefix_hashes(list(range(40)), 16, "tenant") != prefix_hashes(list(range(40)), 16, "")
    assert owner.prompt_hashes(16) is owner.prompt_hashes(16) and len(owner.prompt_hashes(8)) == 5


def test_a_restored_choice_is_the_one_that_the_snapshot_was_taken_of() -> None:
    """Every field of the snapshot differs from a new choice's, so that none can be forgotten."""
    registry = ReplicaRegistry(replica_timeout_s=2.0, hang_floor_s=10.0)
    registry.hello(b"a", "", HELLO, 0.0)
    attempt = Attempt(
        replica="a", epoch=5, number=2, placed_because="only", tokens=3, cached=None, expected_s=0.0, emitted_before=0, queued_at=1.0,
        sent_at=2.0,
    )  # fmt: skip
    taken = ChoiceSnapshot(
        id=70, phase="running", emitted=4, resumed_from=1, granted=9, queued_at=3.0, sent_at=4.0, attempts=[attempt], replica="a", stream=9,
        attempt_number=2, sends=2, deaths=1, emitted_at_send=2, ended_short=True, prompt_logprobs_sent=True, paused=True, cached_tokens=1,
        answer_by=5.0, seen=3, seen_at=4.5, gap=2, questioned=True,
    )  # fmt: skip
    new = choice_of(request(), []).snapshot()
    assert [name for name in taken.__struct_fields__ if getattr(new, name) == getattr(taken, name)] == ["id"]
    restored = ChoiceState.restored(request(), 0, taken, registry)
    assert restored.snapshot() == taken and restored.replica is registry.replicas["a"]
