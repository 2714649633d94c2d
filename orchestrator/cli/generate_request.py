"""What `chat`, `generate` and `bench` share: the flags of a request, the backend that it goes to, and how its answer is printed."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from orchestrator.cli.console import Console
from orchestrator.cli.running_deployments import NAME_ONE, pick, the_only_one
from workers.protocol.errors import Rejected, TriremeError, Unavailable

if TYPE_CHECKING:
    from workers.protocol.messages import ApiEndpoint

#: Address of the HTTP API if no deployment of this user runs on this machine; another user or a container may run one there.
DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE, KEY_VARIABLE = "TRIREME_URL", "TRIREME_API_KEY"
#: Hints for refusals, which come over HTTP and RPC without one.
HINTS = {
    "model_not_found": "leave --model out for the first model that is served",
    "context_length_exceeded": "shorten it, or ask for a shorter answer with --max-tokens",
}

Url = Annotated[str, typer.Option("--url", help=f"HTTP address of a deployment; or set {URL_VARIABLE}.")]
Rpc = Annotated[bool, typer.Option("--rpc", help="Use ZeroMQ RPC instead of HTTP.")]
Name = Annotated[str, typer.Option("--name", help="Name of a deployment on this machine; needed if several run.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Name of a served model; by default the first one.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 = always the most likely token.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answer.")]


class GenerateBackend(Protocol):
    """A connection to a running deployment: HTTP or RPC."""

    def models(self) -> list[str]: ...

    def card(self, model: str) -> dict[str, Any]: ...

    def stream(self, endpoint: ApiEndpoint, body: dict[str, Any]) -> Generator[str]: ...

    def close(self) -> None: ...


def open_backend(url: str, rpc: bool, name: str, run_dir: str) -> GenerateBackend:
    """Connect to the HTTP API (:func:`http_address`), or to the RPC server of a deployment on this machine.

    The API key comes from the environment, not from a flag, because other users can read flags.
    """
    if rpc and url:
        raise Rejected("--url is the address of the HTTP API", hint="leave it or --rpc out; RPC takes --name")
    if rpc:
        status = pick(name, run_dir, NAME_ONE).status()
    else:
        url = http_address(url, name, run_dir)
    from orchestrator.cli import generate_backends  # imported here: if nothing runs, the error needs no HTTP client

    return generate_backends.RpcBackend(status) if rpc else generate_backends.HttpBackend(url, os.environ.get(KEY_VARIABLE, ""))


def http_address(url: str, name: str, run_dir: str) -> str:
    """The address of the HTTP API: ``url``, else that of the deployment ``name``, else TRIREME_URL, else that of the only deployment that
    runs on this machine, else the usual port of this machine.

    Raises :class:`Rejected` if both a URL and a name are given, or if several deployments run; :class:`NotFound`; :class:`Unavailable`
    before the deployment has an address.
    """
    if url and name:
        raise Rejected("--url and --name name two deployments", hint="leave one of them out")
    if url:
        return url
    if not name and (told := os.environ.get(URL_VARIABLE)):
        return told
    status = pick(name, run_dir).status() if name else the_only_one(run_dir, f"{NAME_ONE}, or with --url")
    if status is None:
        return DEFAULT_URL
    if not status.url:
        raise Unavailable(f"{status.name} has no HTTP address yet", hint=f"trireme status {status.name}, or give --url")
    return status.url


def print_answer(console: Console, pieces: Generator[str]) -> str:
    """Print pieces of text as they arrive and return the whole text; Ctrl-C ends the answer, not the command."""
    parts: list[str] = []
    try:
        for piece in pieces:
            parts.append(piece)
            console.out(piece, end="")
    except KeyboardInterrupt:
        pieces.close()
    except TriremeError as error:
        error.hint = error.hint or HINTS.get(error.code, "")
        raise
    console.out()
    return "".join(parts)


def request_body(model: str, backend: GenerateBackend, max_tokens: int, temperature: float, seed: int | None) -> dict[str, Any]:
    """The fields of the request body that chat and generate share."""
    body: dict[str, Any] = {"model": model or backend.models()[0], "max_tokens": max_tokens, "temperature": temperature}
    return body if seed is None else body | {"seed": seed}
