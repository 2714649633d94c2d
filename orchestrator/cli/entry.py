"""Entry point of the distribution. Where only the client is installed, it says how to install the command line."""

from __future__ import annotations

import sys

from orchestrator.cli.extras import missing_package


def main() -> None:
    try:
        from orchestrator.cli.main import run
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        print(missing.lines(), file=sys.stderr)
        sys.exit(missing.exit_code)
    sys.exit(run(sys.argv[1:]))
