"""Tenants of the RPC door: a client's key decides which models there are for it, over real CURVE."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import zmq

from orchestrator.auth.keyring import KeyRing
from orchestrator.client import Client, ClientKeys
from orchestrator.control.host.router_poller import query
from tests.support.gang import short_folder, wait_for
from tests.support.router_process import RouterRun, curve_replica
from workers.protocol.errors import NotFound
from workers.protocol.messages import Failed, Query, Report
from workers.protocol.specs import RouterAddress


def test_a_clients_key_decides_what_it_may_use_and_see() -> None:
    with short_folder() as folder:
        ring = KeyRing(folder / "keys")
        ring.allow([("router", "all"), ("replica", "a"), ("client", "local")])
        ring.admit_client("alice", ["m"])
        ring.admit_client("bob", ["other"])
        with RouterRun(
            folder, back="tcp://127.0.0.1:*", rpc="tcp://127.0.0.1:*", key_file=str(ring.path("router", "all")),
            allowed_file=str(ring.allowed_file), salt_file=str(ring.salt_file),
        ) as router:  # fmt: skip
            state = router.wait_serving()
            server = ring.pair("router", "all").public
            rpc = RouterAddress(endpoint=state.rpc, server_key=server)

            def client(name: str) -> Client:
                keys = msgspec.json.decode(ring.path("client", name).read_bytes(), type=ClientKeys)
                return Client([rpc], model="m", keys=keys)

            back = RouterAddress(endpoint=state.back, server_key=server)
            with (
                curve_replica(folder, "a", back, ring.path("replica", "a")),
                client("local") as local,
                client("alice") as alice,
                client("bob") as bob,
            ):
                wait_for(lambda: any(row["state"] == "ready" for row in local.status()["replicas"]), what="the replica")
                prompt = list(range(1, 100))
                options = {"texts": False, "max_tokens": 2, "ignore_eos": True}
                assert local.complete(prompt, **options).result().choices[0].usage.cached_tokens == 0
                assert local.complete(prompt, **options).result().choices[0].usage.cached_tokens > 0
                assert alice.complete(prompt, **options).result().choices[0].usage.cached_tokens == 0, "another tenant's prefix was seen"
                assert alice.complete(prompt, **options).result().choices[0].usage.cached_tokens > 0
                for model in ("m", "ghost"):
                    with pytest.raises(NotFound) as caught:
                        bob.complete(prompt, model=model, **options).result()
                    assert caught.value.code == "model_not_found" and str(caught.value) == f"The model `{model}` does not exist"
                assert [model["id"] for model in alice.models()] == ["m"] and bob.models() == []
                for who in (alice, bob):
                    with pytest.raises(NotFound):
                        who.status()
                context: zmq.Context[Any] = zmq.Context()
                try:
                    for what in ("dump", "story"):
                        question = Query(boot="debug", stream=1, what=what, about="q")  # type: ignore[arg-type]
                        for name in ("alice", "bob"):
                            refusal = query(context, rpc, ring.pair("client", name), question)
                            assert isinstance(refusal, Failed) and refusal.code == "not_found"
                        answer = query(context, rpc, ring.pair("client", "local"), question, 10_000)
                        assert isinstance(answer, Report) and msgspec.json.decode(answer.body)["router"] == "router0"
                finally:
                    context.destroy(linger=0)
                ring.admit_client("bob", [])
                wait_for(lambda: bob.models() != [], what="the wider grant")
                assert bob.complete(prompt, **options).result().tokens
