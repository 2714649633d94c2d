"""Backends of `chat`, `generate` and `bench`: they send a request to a running deployment over HTTP or ZeroMQ RPC, and yield the answer in
pieces of text.

A backend owns one connection. It prints nothing.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from orchestrator.client import Client, ClientKeys
from orchestrator.control.host.control_socket import DeploymentStatus
from orchestrator.files import read_private
from workers.protocol.errors import EngineFault, EnvironmentFault, NotFound, Rejected, Unavailable, from_code, printable
from workers.protocol.messages import ApiEndpoint

PATHS: dict[ApiEndpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
CONNECT_S = 5.0
#: Longest silence inside one answer, seconds: queues may be long.
SILENCE_S = 120.0


class HttpBackend:
    """The OpenAI endpoint at ``url``, used with the API key ``key`` unless it is empty. ``transport`` replaces the network in tests."""

    def __init__(self, url: str, key: str = "", transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise Rejected(f"{url} is not an HTTP address", "one begins with http:// or https://", f"try http://{url.rpartition('//')[2]}")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
        self._http = httpx.Client(base_url=self.url, timeout=timeout, headers=headers, transport=transport, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Names of the served models, the default first."""
        return [card["id"] for card in self._get("/v1/models")["data"]]

    def card(self, model: str) -> dict[str, Any]:
        """The card of a served model, by default the first one: ``id``, and ``max_model_len`` if it is known. Raises NotFound."""
        cards = self._get("/v1/models")["data"]
        found = next((card for card in cards if model in ("", card["id"])), None)
        if found is None and not model:
            raise Unavailable(f"{self.url} serves no model")
        return dict(found if found is not None else self._get(f"/v1/models/{model}"))  # an alias is not listed

    def stream(self, endpoint: ApiEndpoint, body: dict[str, Any]) -> Generator[str]:
        """Stream an answer. Raises the error that the endpoint names (:func:`workers.protocol.errors.from_code`), also in mid-stream."""
        try:
            with self._http.stream("POST", PATHS[endpoint], json={**body, "stream": True}) as response:
                if response.status_code != 200:
                    raise _refusal(response.read(), response.status_code)
                yield from _pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _get(self, path: str) -> Any:
        try:
            response = self._http.get(path)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.status_code != 200:
            raise _refusal(response.content, response.status_code)
        return response.json()

    def _unreachable(self, error: httpx.HTTPError) -> EnvironmentFault:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return EnvironmentFault(f"nothing answers at {self.url}", str(error), "start a deployment (trireme up FILE), or name its --url")
        return EnvironmentFault(f"the connection to {self.url} broke", f"{type(error).__name__} {error}".strip(), "trireme status")


class RpcBackend:
    """The RPC servers of a deployment on this machine; its status names their addresses and the file of the keys."""

    def __init__(self, status: DeploymentStatus) -> None:
        if not status.rpc:
            raise Unavailable(f"{status.name} has no router yet", hint=f"trireme status {status.name}")
        self._client = Client(status.rpc, keys=client_keys(status))

    def close(self) -> None:
        self._client.close()

    def models(self) -> list[str]:
        """As :meth:`HttpBackend.models`."""
        return [card["id"] for card in self._client.models()]

    def card(self, model: str) -> dict[str, Any]:
        """As :meth:`HttpBackend.card`."""
        found = next((card for card in self._client.models() if model in ("", card["id"], *card["aliases"])), None)
        if found is None:
            raise NotFound(f"The model `{printable(model)}` does not exist", code="model_not_found")
        return {"id": model or found["id"], "max_model_len": (found["status"] or {}).get("max_seq_len") or None}

    def stream(self, endpoint: ApiEndpoint, body: dict[str, Any]) -> Generator[str]:
        """As :meth:`HttpBackend.stream`; if the caller stops early, the request is cancelled."""
        options = dict(body)
        if endpoint == "chat":
            call = self._client.chat(options.pop("messages"), **options)
        else:
            call = self._client.complete(options.pop("prompt"), **options)
        try:
            for piece in call.stream():
                if piece.text:
                    yield piece.text
        finally:
            call.cancel()


def client_keys(status: DeploymentStatus) -> ClientKeys | None:
    """This user's key pair for a deployment's RPC servers; None if they need none. Raises EnvironmentFault if it cannot be read."""
    if not any(address.endpoint.startswith("tcp://") for address in status.rpc):
        return None
    return msgspec.json.decode(read_private(Path(status.key_file)), type=ClientKeys)


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """The text in a stream of server-sent events. Raises :class:`EngineFault` when it ends before ``[DONE]``."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise from_code(str(event["error"].get("code")), event["error"]["message"])
        for choice in event["choices"]:
            if text := choice.get("text") or choice.get("delta", {}).get("content"):
                yield text
    raise EngineFault("the answer broke off", "the stream ended without its last line", "ask again")


def _refusal(content: bytes, status: int) -> Exception:
    """The error that an HTTP answer carries in OpenAI's form."""
    try:
        error = json.loads(content)["error"]
        return from_code(str(error["code"]), error["message"])
    except (ValueError, KeyError, TypeError):
        return EngineFault(f"HTTP {status}", content[:200].decode(errors="replace"), "is this the address of a trireme router?")
