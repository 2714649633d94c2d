"""TCP ports of this machine that nobody listens on, for tests whose processes must know them before."""

from __future__ import annotations

import os
import socket


def free_ports(count: int) -> int:
    """The first of ``count`` neighbours that nobody listens on. Each process looks elsewhere first: what is free is not yet taken."""
    begin = os.getpid() * 16
    for first in (20000 + (begin + step) % 12000 for step in range(0, 12000, 16)):
        probes = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        else:
            return first
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")
