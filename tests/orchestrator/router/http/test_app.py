"""Paths that belong to no dialect: the root, paths that do not exist, and requests of web pages (CORS)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.auth.api_keys import ApiKeys, mint
from orchestrator.config.router_spec import HttpConfig
from tests.support.scripted_router import ServedDoor
from workers.protocol.errors import ConfigError

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PAGE = "https://chat.example.org"


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDoor]:
    with ServedDoor(tmp_path_factory.mktemp("app")) as door:
        yield door


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServedDoor, str]]:
    """A door with keys that pages of one origin may use, and a key that is bound to its model."""
    key, row = mint("bob", ("tiny",), 1)
    with ServedDoor(tmp_path_factory.mktemp("keyed"), ApiKeys([row]), allowed_origins=(PAGE,)) as door:
        yield door, key


def message(door: ServedDoor, method: str, path: str, **headers: str) -> str:
    response = door.http.request(method, path, headers=headers)
    assert response.status_code in (404, 405) and response.headers["x-request-id"]
    return str(response.json()["error"]["message"])


def test_the_root_leads_to_the_status_page(door: ServedDoor) -> None:
    response = door.http.get("/")
    assert response.status_code == 302 and response.headers["location"] == "/ui"


def test_a_path_that_is_not_there_is_named_with_what_there_is(door: ServedDoor) -> None:
    assert message(door, "POST", "/v1/chat/completion") == f"there is no path /v1/chat/completion: did you mean {CHAT}?"
    assert message(door, "POST", "/v1/completions/") == "there is no path /v1/completions/: did you mean /v1/completions?"
    far = message(door, "GET", "/v1/assistants")
    assert all(path in far for path in (CHAT, "/v1/completions", "/v1/models", "/health", "/status")) and "{" not in far
    assert message(door, "GET", CHAT) == f"{CHAT} does not take GET: it takes POST"
    odd = message(door, "GET", "/" + "%0d%0a" * 9 + "x" * 900)
    assert odd.startswith("there is no path /\\r\\n") and odd.isprintable() and len(odd) < 900


def test_a_key_that_is_bound_to_models_sees_no_path_that_names_others(keyed: tuple[ServedDoor, str]) -> None:
    door, key = keyed
    text = message(door, "GET", "/status", authorization=f"Bearer {key}")
    assert text.startswith("there is no path /status: ") and "/metrics" not in text and "/v1/models" in text


def test_pages_of_other_origins_are_not_let_in_by_default(door: ServedDoor) -> None:
    answer = door.http.post(CHAT, json=BODY, headers={"origin": PAGE})
    assert answer.status_code == 200 and not [name for name in answer.headers if name.startswith("access-control")]
    assert door.http.options(CHAT, headers={"origin": PAGE, "access-control-request-method": "POST"}).status_code == 405


def test_pages_of_an_allowed_origin_may_ask_and_read(keyed: tuple[ServedDoor, str]) -> None:
    door, key = keyed
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type,x-stainless-os"}
    before = door.http.options(CHAT, headers={"origin": PAGE, **asked})
    assert before.status_code == 200, "a browser asks without the key"
    assert before.headers["access-control-allow-origin"] == PAGE and "POST" in before.headers["access-control-allow-methods"]
    assert "x-stainless-os" in before.headers["access-control-allow-headers"]
    for stream in (False, True):
        body = {**BODY, "stream": stream, "temprature": 1}
        answer = door.http.post(CHAT, json=body, headers={"origin": PAGE, "authorization": f"Bearer {key}"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["x-trireme-ignored"] == "temprature"
        assert "x-trireme-ignored" in answer.headers["access-control-expose-headers"]
    refused = door.http.post(CHAT, json=BODY, headers={"origin": PAGE})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == PAGE, "a page can read why"
    for origin in ("https://evil.example.org", "null", PAGE + ".evil.org"):
        assert "access-control-allow-origin" not in door.http.post(CHAT, json=BODY, headers={"origin": origin}).headers
        assert door.http.options(CHAT, headers={"origin": origin, **asked}).status_code == 400


def test_all_origins(tmp_path: Path) -> None:
    with ServedDoor(tmp_path, allowed_origins=("*",)) as door:
        assert door.http.post(CHAT, json=BODY, headers={"origin": PAGE}).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["chat.example.org", "https://a.org/path", "https://", "https://a b", "null", ""])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"http\.allowed_origins"):
        HttpConfig(allowed_origins=(origin,))
