"""`trireme chat`: one question to a running deployment, or a conversation. Owns the conversation."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated, Any

import typer

from orchestrator.cli.console import Console
from orchestrator.cli.generate_request import (
    GenerateBackend,
    MaxTokens,
    Model,
    Name,
    Rpc,
    Seed,
    Temperature,
    Url,
    open_backend,
    print_answer,
    request_body,
)
from orchestrator.cli.running_deployments import DEFAULT_RUN_DIR, RunDir
from workers.protocol.errors import Rejected, TriremeError


def chat(
    context: typer.Context,
    message: Annotated[str | None, typer.Argument(help="One question; without it, start a conversation, or read a pipe.")] = None,
    system: Annotated[str, typer.Option("--system", "-s", help="The system message.")] = "",
    url: Url = "",
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
    with closing(open_backend(url, rpc, name, run_dir)) as backend:
        body = request_body(model, backend, max_tokens, temperature, seed)
        if message is not None:
            if not message:
                raise Rejected("there is no question", "the pipe was empty", 'trireme chat "..."')
            print_answer(console, backend.stream("chat", body | {"messages": [*messages, {"role": "user", "content": message}]}))
        else:
            converse(console, backend, body, messages)


def converse(console: Console, backend: GenerateBackend, body: dict[str, Any], messages: list[dict[str, str]]) -> None:
    """Read questions until the input ends; each answer is added to the conversation, a failed question is not."""
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
            answer = print_answer(console, backend.stream("chat", body | {"messages": asked}))
        except TriremeError as error:
            console.fail(error)
        else:
            messages = [*asked, {"role": "assistant", "content": answer}]
