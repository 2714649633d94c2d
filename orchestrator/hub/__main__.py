"""The process that downloads a model: reads one :class:`FetchOrder` from its standard input and answers in JSON lines."""

from __future__ import annotations

import os
import sys
import traceback

import msgspec

from orchestrator.hub.fetch import Fetched, FetchFailed, FetchMessage, FetchOrder, FetchProgress
from workers.process import die_with_parent
from workers.protocol.errors import ErrorReport, TriremeError


def tell(message: FetchMessage) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    die_with_parent()
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=FetchOrder)
    from orchestrator.hub.download import download

    try:
        path = download(order, lambda phase, done, total: tell(FetchProgress(phase=phase, done=done, total=total)))
        tell(Fetched(path=str(path)))
    except TriremeError as error:
        tell(FetchFailed(error=ErrorReport.of(error)))
    except Exception:
        traceback.print_exc()
    # Threads of other downloads may still run when one has failed.
    sys.stderr.flush()
    os._exit(0)


main()
