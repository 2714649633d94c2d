"""The paths of the router's HTTP door and of the port for Prometheus, and what is answered to requests that need no replica's words.

``routes.txt``: method and path of every route. ``plain.txt``: answers about the door itself. ``errors.txt``: refusals, by what is wrong.
``ui_headers.txt``: the headers of the status page, without the hashes of its contents. Record again:
``python -m tests.recorded.record routes``.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from orchestrator.auth.keyring import ApiKeyRing
from orchestrator.config.router_spec import HttpSpec
from orchestrator.router.http.app import build_app
from orchestrator.router.http.metrics_app import build_scrape_app
from orchestrator.router.metrics import Metrics
from tests.recorded import door
from tests.recorded.recording import as_text, check, check_names
from tests.recorded.stage import MAX_BODY, Stage
from tests.support.gang import short_folder
from tests.support.router_process import RouterRun
from tests.support.scripted_router import ServedDoor

AREA = "routes"
CHAT, TEXT, V2 = "/v1/chat/completions", "/v1/completions", "/v2/models/m"
NAMES = ["routes.txt", "plain.txt", "errors.txt", "ui_headers.txt", "scrape.txt"]


class Row(NamedTuple):
    method: str
    path: str
    body: Any = None
    headers: dict[str, str] | None = None


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "hi", **fields}


PLAIN = {
    "root": Row("GET", "/"),
    "health": Row("GET", "/health"),
    "ping": Row("POST", "/ping"),
    "ready": Row("GET", "/ready"),
    "models": Row("GET", "/v1/models"),
    "one model": Row("GET", "/v1/models/m"),
    "version": Row("GET", "/version"),
    "tokenize": Row("POST", "/tokenize", {"model": "m", "prompt": "hi"}),
    "tokenize a chat": Row("POST", "/tokenize", chat()),
    "tokenize a chat to go on with": Row("POST", "/tokenize", chat(continue_final_message=True)),
    "detokenize": Row("POST", "/detokenize", {"model": "m", "tokens": [104, 105, 258]}),
    "server": Row("GET", "/v2"),
    "live": Row("GET", "/v2/health/live"),
    "ready in KServe's words": Row("GET", "/v2/health/ready"),
    "model ready": Row("GET", f"{V2}/ready"),
    "metadata": Row("GET", V2),
    "metadata of a version": Row("GET", f"{V2}/versions/1"),
    "config": Row("GET", f"{V2}/config"),
}
ERRORS = {
    "no such path": Row("GET", "/nothing"),
    "path nearly right": Row("POST", "/v1/chat/completion", chat()),
    "slash at the end": Row("GET", "/health/"),
    "wrong method": Row("GET", CHAT),
    "wrong method, other way": Row("DELETE", "/health"),
    "no body": Row("POST", CHAT, b""),
    "no JSON": Row("POST", CHAT, b"{"),
    "no object": Row("POST", CHAT, []),
    "no JSON by its type": Row("POST", CHAT, chat(), {"content-type": "text/plain"}),
    "compressed": Row("POST", CHAT, chat(), {"content-encoding": "gzip"}),
    "too large": Row("POST", CHAT, b" " * (MAX_BODY + 1)),
    "unknown model": Row("POST", CHAT, chat(model="ghost")),
    "unknown model asked for": Row("GET", "/v1/models/ghost"),
    "field missing": Row("POST", CHAT, {"model": "m"}),
    "field of a wrong type": Row("POST", TEXT, text(max_tokens="many")),
    "temperature below 0": Row("POST", CHAT, chat(temperature=-1)),
    "top_p of 0": Row("POST", TEXT, text(top_p=0)),
    "too many choices": Row("POST", CHAT, chat(n=9)),
    "no token": Row("POST", TEXT, text(max_tokens=0)),
    "too long": Row("POST", TEXT, text(prompt="x" * 2000)),
    "no room for the answer": Row("POST", TEXT, text(max_tokens=2000)),
    "empty prompt": Row("POST", TEXT, text(prompt="")),
    "token out of the vocabulary": Row("POST", TEXT, text(prompt=[5000])),
    "too many logprobs": Row("POST", TEXT, text(logprobs=21)),
    "empty stop string": Row("POST", CHAT, chat(stop="")),
    "unknown role": Row("POST", CHAT, chat(messages=[{"role": "king", "content": "hi"}])),
    "bad schema": Row("POST", CHAT, chat(guided_json="{")),
    "tool that is not there": Row("POST", CHAT, chat(tool_choice="required")),
    "unknown token to decode": Row("POST", "/detokenize", {"model": "m", "tokens": [5000]}),
    "KServe: no such path": Row("GET", "/v2/nothing"),
    "KServe: unknown model": Row("POST", "/v2/models/ghost/generate", {"text_input": "hi"}),
    "KServe: unknown version": Row("GET", f"{V2}/versions/2"),
    "KServe: no text": Row("POST", f"{V2}/generate", {}),
    "KServe: stream at generate": Row("POST", f"{V2}/generate", {"text_input": "hi", "stream": True}),
    "KServe: no tensors": Row("POST", f"{V2}/infer", {"inputs": []}),
    "KServe: binary tensors": Row("POST", f"{V2}/infer", b"{}", {"inference-header-content-length": "2"}),
}
#: At a router with API keys and without a replica.
KEYED = {
    "no key": Row("GET", "/v1/models"),
    "wrong key": Row("GET", "/v1/models", None, {"authorization": "Bearer wrong"}),
    "no key, KServe": Row("GET", "/v2"),
    "health needs none": Row("GET", "/health"),
    "no replica yet": Row("GET", "/ready"),
    "no replica yet, KServe": Row("GET", "/v2/health/ready"),
}


def routes() -> str:
    """Read from the applications themselves, so that a new path is seen."""
    with short_folder() as folder:
        made = ServedDoor(folder)  # its parts alone: it is not entered, so it serves nothing
        apps = {
            "router": build_app(made.spec, made.dispatcher, made.preprocessor, made.metrics, made.caps),
            "scrape": build_scrape_app(made.metrics),
        }
        made.http.close()
        made.texts.close()
        made._listener.close()
    blocks = []
    for name, app in apps.items():
        rows = [f"{method} {route.path}" for route in starlette_of(app).routes for method in sorted(route.methods)]  # type: ignore[attr-defined]
        blocks.append("\n".join([f"# {name}, in the order in which they are tried", *rows]))
    return "\n\n".join(blocks)


def starlette_of(app: Any) -> Starlette:
    """The application inside of its middlewares."""
    while not isinstance(app, Starlette):
        app = app.app if hasattr(app, "app") else app._app
    return app


def told(url: str, rows: dict[str, Row], places: dict[str, str]) -> str:
    blocks = []
    for what, row in rows.items():
        answer = door.ask(url, row.method, row.path, row.body, {"x-request-id": "recorded", **(row.headers or {})})
        blocks.append(f"# {what}\n{row.method} {row.path}\n{door.shown(answer, places)}")
    return re.sub(r'"version":"[^"]+"', '"version":"<version>"', "\n".join(blocks))


def recordings() -> dict[str, str]:
    with Stage() as stage:
        plain, errors = told(stage.url, PLAIN, stage.places), told(stage.url, ERRORS, stage.places)
        page = stage.get("/ui")
    with short_folder() as folder:
        ring = ApiKeyRing(folder / "api.json")
        ring.add("alice", [])
        with RouterRun(folder, "keyed", http=HttpSpec(port=0, api_keys_file=str(ring.path))) as router:
            errors += "\n" + told(router.wait_serving().http, KEYED, {})
    assert page.body.startswith(b"<!doctype html>")
    headers = re.sub(r"sha256-[A-Za-z0-9+/=]+", "sha256-<hash>", door.shown(page._replace(body=b"")))
    scraped = TestClient(build_scrape_app(Metrics(["m"])))
    paths = ("/health", "/metrics", "/nothing")
    scrape = [f"GET {path}\n{got.status_code} {got.headers['content-type']}" for path in paths if (got := scraped.get(path)) is not None]
    return {
        "routes.txt": as_text(routes()),
        "plain.txt": as_text(plain),
        "errors.txt": as_text(errors),
        "ui_headers.txt": as_text(re.sub(r"x-request-id: .*", "x-request-id: <id>", headers)),
        "scrape.txt": as_text("\n".join(scrape)),
    }


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return recordings()


@pytest.mark.parametrize("name", NAMES)
def test_the_doors_answer_as_recorded(name: str, now: dict[str, str]) -> None:
    check(AREA, name, now[name])


def test_nothing_else_is_recorded() -> None:
    check_names(AREA, NAMES)
