"""API keys and tenants at the HTTP door, over real sockets: who gets in, what they may use and see, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from orchestrator.auth.api_keys import ApiKeys, Salting, Tenant, mint
from orchestrator.auth.keyring import ApiKeyRing
from orchestrator.config.router_spec import HttpSpec
from orchestrator.router.http.server import bind
from tests.support.gang import short_folder, wait_for
from tests.support.router_process import RouterRun
from tests.support.scripted_router import ServedDoor
from workers.protocol.errors import ConfigError, NotFound, Rejected

MINTED = {
    name: mint(tenant, models, 0)
    for name, tenant, models in (
        ("alice", "alice", None), ("alice again", "alice", None), ("bob", "bob", ("tiny-alias",)), ("carol", "carol", ("other",)),
        ("dan", "dan", ()),
    )
}  # fmt: skip
KEYS = {name: key for name, (key, _) in MINTED.items()}
ROUTES = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/status"),
    ("GET", "/version"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/admin"), ("PUT", "/v1/models"),
    ("GET", "/health/"), ("GET", "/%2Fhealth"), ("GET", "/metrics/"),
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    with ServedDoor(tmp_path_factory.mktemp("tokenizer"), ApiKeys(row for _, row in MINTED.values())) as door:
        yield door


@pytest.fixture
def door(served: ServedDoor) -> ServedDoor:
    served.dispatcher.reset()
    return served


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def test_every_route_but_the_probes_needs_a_key(door: ServedDoor) -> None:
    bodies = set()
    for method, path in ROUTES:
        answer = door.http.request(method, path, json={"model": "tiny"} if method == "POST" else None)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", path
        bodies.add(answer.content)
    assert len(bodies) == 1, "a stranger can tell paths apart"
    assert door.http.get("/v1/models").json()["error"]["code"] == "authentication_error"
    for path in ("/health", "/ready", "/ping", "/metrics"):
        assert door.http.get(path).status_code == 200
    assert door.http.get("/").headers["location"] == "/ui", "the page is open too, and has no numbers without a key"
    assert door.http.get("/v1/models", headers=bearer("alice")).status_code == 200
    assert door.http.get("/admin", headers=bearer("alice")).status_code == 404
    assert 'trireme_router_refused_requests_total{code="authentication_error"}' in door.http.get("/metrics").text


def test_a_wrong_key_is_no_key_and_is_never_echoed(door: ServedDoor) -> None:
    key = KEYS["alice"]
    other = KEYS["bob"]
    plain = door.http.get("/v1/models").content
    wrong = [
        f"Bearer {key[:-1]}{'0' if key[-1] != '0' else '1'}",
        f"Bearer {key}x",
        f"Bearer {key.rpartition('-')[0]}-{other.rpartition('-')[2]}",
        "Bearer trireme-000000000000-planted",
        "Bearer -",
        "Bearer",
        f"Basic {key}",
        key,
        "Bearer " + "x" * 20_000,
    ]
    for header in wrong:
        answer = door.http.get("/v1/models", headers={"authorization": header})
        assert (answer.status_code, answer.content) == (401, plain), header[:40]
    assert door.http.get(f"/v1/models?api_key={key}").content == plain
    twice = [("authorization", f"Bearer {key}"), ("authorization", "Bearer no")]
    assert door.http.get("/v1/models", headers=twice).content == plain
    assert door.http.get("/v1/models", headers={"authorization": f"bearer  {key}"}).status_code == 200


def test_metrics_are_open_on_loopback_only(door: ServedDoor) -> None:
    elsewhere = {"x-forwarded-for": "192.0.2.7"}
    assert door.http.get("/metrics", headers=elsewhere).status_code == 401
    assert door.http.get("/metrics", headers=elsewhere | bearer("alice")).status_code == 200
    assert door.http.get("/metrics", headers=elsewhere | bearer("bob")).status_code == 404
    assert door.http.get("/health", headers=elsewhere).status_code == 200


def test_a_model_that_is_not_allowed_looks_like_none(door: ServedDoor) -> None:
    hello = [{"role": "user", "content": "hi"}]
    requests = [
        ("/v1/chat/completions", {"messages": hello}), ("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ]  # fmt: skip
    for path, body in requests:
        for name, status in (("alice", 200), ("bob", 200), ("carol", 404), ("dan", 404)):
            answer = door.http.post(path, json=body | {"model": "tiny"}, headers=bearer(name))
            assert answer.status_code == status, (path, name)
        missing = door.http.post(path, json=body | {"model": "ghost"}, headers=bearer("carol")).text
        assert answer.json()["error"]["code"] == "model_not_found" and answer.text == missing.replace("ghost", "tiny")
    for name, count in (("alice", 1), ("bob", 1), ("carol", 0), ("dan", 0)):
        assert len(door.http.get("/v1/models", headers=bearer(name)).json()["data"]) == count
        assert door.http.get("/v1/models/tiny", headers=bearer(name)).status_code == (200 if count else 404)
    assert door.http.get("/status", headers=bearer("alice")).status_code == 200
    assert door.http.get("/status", headers=bearer("bob")).status_code == 404, "it names models that are not this tenant's"


def test_prefixes_are_shared_within_a_tenant_only(door: ServedDoor) -> None:
    def salt(name: str, **fields: str) -> str:
        answer = door.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", **fields}, headers=bearer(name))
        found = door.dispatcher.asks[-1].salt
        assert answer.status_code == 200 and found not in answer.text and found not in str(answer.headers)
        return found

    assert salt("alice") == salt("alice") == salt("alice again")
    assert salt("alice", cache_salt="s") == salt("alice again", cache_salt="s")
    assert len({salt("alice"), salt("bob"), salt("alice", cache_salt="s"), salt("bob", cache_salt="s")}) == 4


def test_the_salt_is_the_same_at_every_router_and_needs_the_key() -> None:
    assert Salting(b"k").of("a", "bc") == Salting(b"k").of("a", "bc")
    found = {Salting(key).of(tenant, given) for key in (b"k", b"l") for tenant, given in (("a", "bc"), ("ab", "c"), ("", "abc"), ("", ""))}
    assert len(found) == 8


def test_a_table_knows_hashes_only() -> None:
    key, row = mint("a", None, 0)
    secret = key.rpartition("-")[2]
    assert len(secret) == 64 and secret not in repr(row)
    keys = ApiKeys([row])
    assert keys.tenant(f"Bearer {key}") == Tenant("a", key=row.id)
    keys.replace([])
    assert keys.tenant(f"Bearer {key}") is None


def test_a_key_file_is_private_and_revocable(tmp_path: Path) -> None:
    ring = ApiKeyRing(tmp_path / "new" / "api.json")
    first, second = ring.add("alice", ["m"]), ring.add("alice", [])
    ring.add("bob", [])
    assert ring.path.stat().st_mode & 0o777 == 0o600 and ring.path.parent.stat().st_mode & 0o777 == 0o700
    assert not any(key.rpartition("-")[2] in ring.path.read_text() for key in (first, second))
    assert [(row.tenant, row.models) for row in ring.rows()] == [("alice", ("m",)), ("alice", None), ("bob", None)]
    assert ring.revoke(ring.rows()[0].id)[0].models == ("m",)
    ring.revoke("alice")
    assert [row.tenant for row in ring.rows()] == ["bob"]
    with pytest.raises(NotFound):
        ring.revoke("alice")
    for name in ("", "../x", "A", "a b", "x" * 65):
        with pytest.raises(Rejected):
            ring.add(name, [])
    ring.path.chmod(0o644)
    with pytest.raises(ConfigError, match="readable by others"):
        ring.rows()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_reach_a_door_with_keys_only(host: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        bind(HttpSpec(host=host, port=0))
    with pytest.raises(ConfigError, match="loopback") as caught:
        bind(HttpSpec(host=host, port=0, api_keys_file="x"))
    assert "TLS" in caught.value.why
    bind(HttpSpec(host=host, port=0, api_keys_file="x", insecure_without_tls=True)).close()
    bind(HttpSpec(host=host, port=0, insecure_without_keys=True)).close()


def test_a_router_follows_its_key_file() -> None:
    """New keys open and revoked ones close a running router; a file that is broken, gone or open to others changes nothing."""
    with short_folder() as folder:
        ring = ApiKeyRing(folder / "api.json")
        key = ring.add("alice", [])
        with RouterRun(folder, http=HttpSpec(port=0, api_keys_file=str(ring.path))) as router:
            url = router.wait_serving().http

            def status(key: str) -> int:
                return httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}, trust_env=False).status_code

            assert status(key) == 200 and status("none") == 401
            second = ring.add("bob", [])
            wait_for(lambda: status(second) == 200, what="the new key")
            good = ring.path.read_bytes()
            ring.path.write_bytes(b'{"keys": "planted"}')
            wait_for(lambda: "not taken over" in router.log.read_text(), what="the complaint")
            ring.path.unlink()
            wait_for(lambda: "cannot read the key file" in router.log.read_text(), what="the second complaint")
            assert status(key) == status(second) == 200 and "planted" not in router.log.read_text()
            ring.path.write_bytes(good)
            ring.path.chmod(0o600)
            ring.revoke("alice")
            wait_for(lambda: status(key) == 401, what="the end of the revoked key")
            assert status(second) == 200


@pytest.mark.parametrize("case", ["missing", "open", "broken"])
def test_a_router_does_not_start_with_a_bad_key_file(case: str) -> None:
    with short_folder() as folder:
        file = folder / "api.json"
        if case != "missing":
            file.write_text('{"keys": []}' if case == "open" else '{"planted": 1}')
            file.chmod(0o644 if case == "open" else 0o600)
        with RouterRun(folder, http=HttpSpec(port=0, api_keys_file=str(file))) as router:
            assert router.process.wait(30) == ConfigError.exit_code
            said = router.log.read_text()
        assert "planted" not in said and "Traceback" not in said and ("file" in said if case == "broken" else str(file) in said)


def test_a_door_that_is_open_to_all_says_so_at_each_start() -> None:
    with short_folder() as folder:
        for _ in range(2):
            with RouterRun(folder, http=HttpSpec(host="0.0.0.0", port=0, insecure_without_keys=True)) as router:
                url = router.wait_serving().http
                assert httpx.get(url.replace("0.0.0.0", "127.0.0.1") + "/v1/models", trust_env=False).status_code == 200
                wait_for(lambda: "is open to everyone who reaches it" in router.log.read_text(), what="the warning")
