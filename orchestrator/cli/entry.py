"""Entry point of the distribution. Where only the client is installed, it says how to install the command line.

Imports are within :func:`main`, because they take most of the time of a short command, and Ctrl-C then needs no stack trace either.
"""

from __future__ import annotations

import sys


def main() -> None:
    try:
        sys.exit(_run())
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> int:
    from orchestrator.cli.extras import missing_package

    try:
        from orchestrator.cli.main import run
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        print(missing.lines(), file=sys.stderr)
        return missing.exit_code
    return run(sys.argv[1:])
