"""The words of every kind of state, and status structs as JSON."""

from __future__ import annotations

from typing import get_args

import msgspec

from workers.protocol.status import (
    ROW_STATES,
    GangPhase,
    RankPhase,
    ReplicaPhase,
    ReplicaRowState,
    ReplicaStatus,
    RouterStatus,
    RoutingState,
    RpcStatus,
)


def test_a_status_table_has_a_word_for_every_state_of_a_replica() -> None:
    assert ROW_STATES.keys() == {*get_args(ReplicaPhase), *get_args(RoutingState)}
    assert {*ROW_STATES.values()} == {*get_args(ReplicaRowState)} - {"QUARANTINED", "JOINING"}
    assert all(shown == word.upper() for word, shown in ROW_STATES.items())


def test_phases_of_a_gang_hold_those_of_its_ranks_and_phases_of_a_replica_those_of_its_gang() -> None:
    assert {*get_args(RankPhase)} < {*get_args(GangPhase)} < {*get_args(ReplicaPhase)}


def test_only_an_rpc_client_is_told_of_the_rpc_server() -> None:
    status = RouterStatus(router="r", replicas=(ReplicaStatus(name="a", model="m", state="ready", step_tokens=[1, 0]),))
    plain = msgspec.json.encode(status)
    assert b'"rpc"' not in plain and msgspec.json.decode(plain, type=RouterStatus) == status
    told = msgspec.structs.replace(status, rpc=RpcStatus(live=1, malformed=0))
    assert msgspec.json.encode(told) == plain[:-1] + b',"rpc":{"live":1,"malformed":0}}'
