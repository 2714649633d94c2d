"""What `chat`, `generate` and `bench` share: the flags of a request, the backend that it goes to, and how its answer is printed."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from orchestrator.cli.console import Console
from orchestrator.cli.running_deployments import pick
from workers.protocol.errors import TriremeError

if TYPE_CHECKING:
    from workers.protocol.messages import ApiEndpoint

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "TRIREME_API_KEY"
#: Hints for refusals, which come over HTTP and RPC without one.
HINTS = {
    "model_not_found": "leave --model out for the first model that is served",
    "context_length_exceeded": "shorten it, or ask for a shorter answer with --max-tokens",
}

Url = Annotated[str, typer.Option("--url", envvar="TRIREME_URL", help="HTTP address of the deployment.")]
Rpc = Annotated[bool, typer.Option("--rpc", help="Ask over ZeroMQ RPC instead of HTTP.")]
Name = Annotated[str, typer.Option("--name", help="Which deployment of this machine, for --rpc; the only one when not given.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Which of the served models; the first one when not given.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 = always the likeliest token.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed draws the same answer.")]


class GenerateBackend(Protocol):
    """A way to a running deployment: HTTP or RPC."""

    def models(self) -> list[str]: ...

    def card(self, model: str) -> dict[str, Any]: ...

    def stream(self, endpoint: ApiEndpoint, body: dict[str, Any]) -> Generator[str]: ...

    def close(self) -> None: ...


def open_backend(url: str, rpc: bool, name: str, run_dir: str) -> GenerateBackend:
    """Connect to the HTTP API at ``url``, or to the RPC server of a deployment on this machine.

    The API key comes from the environment and not from a flag, because other users can read flags.
    """
    from orchestrator.cli import generate_backends

    if rpc:
        return generate_backends.RpcBackend(pick(name, run_dir).status())
    return generate_backends.HttpBackend(url, os.environ.get(KEY_VARIABLE, ""))


def print_answer(console: Console, pieces: Generator[str]) -> str:
    """Print pieces of text as they come and return the whole text; Ctrl-C ends the answer, not the command."""
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
