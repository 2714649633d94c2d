"""`trireme chat` and `trireme generate`: a running deployment asked over HTTP or over ZeroMQ RPC, its answer streamed to the terminal.

Owns the conversation of an interactive chat. Speaks only what any client may speak.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import closing
from typing import Annotated, Any, Protocol

import typer

from orchestrator.cli.console import Console
from orchestrator.cli.status import DEFAULT_RUN_DIR, RunDir, pick
from workers.protocol.errors import Rejected, TriremeError
from workers.protocol.messages import ApiEndpoint

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "TRIREME_API_KEY"
#: What to do about refusals, which come over a door without a hint.
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


class ChatBackend(Protocol):
    """What HTTP and RPC have in common."""

    def models(self) -> list[str]: ...

    def card(self, model: str) -> dict[str, Any]: ...

    def ask(self, endpoint: ApiEndpoint, body: dict[str, Any]) -> Generator[str]: ...

    def close(self) -> None: ...


def open_door(url: str, rpc: bool, name: str, run_dir: str) -> ChatBackend:
    """The HTTP door at ``url``, or the RPC door of a deployment on this machine. The key is no flag: other users can read those."""
    from orchestrator.cli import chat_backends

    return (
        chat_backends.RpcBackend(pick(name, run_dir).status()) if rpc else chat_backends.HttpBackend(url, os.environ.get(KEY_VARIABLE, ""))
    )


def stream(console: Console, pieces: Generator[str]) -> str:
    """Print pieces as they come and return the whole; Ctrl-C ends the answer, not the command."""
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


def request(model: str, door: ChatBackend, max_tokens: int, temperature: float, seed: int | None) -> dict[str, Any]:
    """The fields that chat and generate share."""
    body: dict[str, Any] = {"model": model or door.models()[0], "max_tokens": max_tokens, "temperature": temperature}
    return body if seed is None else body | {"seed": seed}


def chat(
    context: typer.Context,
    message: Annotated[str | None, typer.Argument(help="One question; without it a conversation starts, or a pipe is read.")] = None,
    system: Annotated[str, typer.Option("--system", "-s", help="The system message.")] = "",
    url: Url = DEFAULT_URL,
    rpc: Rpc = False,
    name: Name = "",
    model: Model = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Talk to a running deployment: one question, or a conversation."""
    console: Console = context.obj
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
    messages = [{"role": "system", "content": system}] if system else []
    with closing(open_door(url, rpc, name, run_dir)) as door:
        body = request(model, door, max_tokens, temperature, seed)
        if message is not None:
            if not message:
                raise Rejected("there is no question", "the pipe was empty", 'trireme chat "..."')
            stream(console, door.ask("chat", body | {"messages": [*messages, {"role": "user", "content": message}]}))
        else:
            converse(console, door, body, messages)


def converse(console: Console, door: ChatBackend, body: dict[str, Any], messages: list[dict[str, str]]) -> None:
    """Questions from the keyboard until it ends; each answer joins the conversation, a failed one leaves it as it was."""
    import readline  # noqa: F401  (importing it gives input() a history and line editing)

    console.say(f"{body['model']}: an empty line or Ctrl-D ends, Ctrl-C stops an answer")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.out()
            return
        if not question:
            return
        asked = [*messages, {"role": "user", "content": question}]
        try:
            answer = stream(console, door.ask("chat", body | {"messages": asked}))
        except TriremeError as error:
            console.fail(error)
        else:
            messages = [*asked, {"role": "assistant", "content": answer}]


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to go on from; '-' reads the standard input.")],
    url: Url = DEFAULT_URL,
    rpc: Rpc = False,
    name: Name = "",
    model: Model = "",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Continue a text with a running deployment, without a chat template."""
    console: Console = context.obj
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise Rejected("the prompt is empty", hint='trireme generate "Once upon a time"')
    with closing(open_door(url, rpc, name, run_dir)) as door:
        stream(console, door.ask("completions", request(model, door, max_tokens, temperature, seed) | {"prompt": text}))


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(chat)
    app.command()(generate)
