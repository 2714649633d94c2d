"""`trireme generate`: a running deployment continues a text."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated

import typer

from orchestrator.cli.console import Console
from orchestrator.cli.generate_request import (
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
from workers.protocol.errors import Rejected


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue; '-' reads the standard input.")],
    url: Url = "",
    rpc: Rpc = False,
    name: Name = "",
    model: Model = "",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Let a running deployment continue a text, without a chat template."""
    console: Console = context.obj
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise Rejected("the prompt is empty", hint='trireme generate "Once upon a time"')
    with closing(open_backend(url, rpc, name, run_dir)) as backend:
        print_answer(console, backend.stream("completions", request_body(model, backend, max_tokens, temperature, seed) | {"prompt": text}))
