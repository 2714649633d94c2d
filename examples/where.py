"""The options of all examples: router and model."""

from __future__ import annotations

import argparse
from pathlib import Path

ROUTER = f"ipc://{Path('~/.local/state/trireme/local/routers/router0-rpc.sock').expanduser()}"


def options(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", action="append", help=f"RPC endpoint, repeatable (default: {ROUTER})")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="HTTP address")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    return parser


def routers(args: argparse.Namespace) -> list[str]:
    return args.router or [ROUTER]
