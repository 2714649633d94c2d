"""A Unix-socket wire that can be cut: bytes stop in both directions and nobody is told, as when a cable is pulled; healed, they flow on.

Owns one thread and its sockets. Like a network it keeps what was on its way; unlike ``close``, a cut shows neither end a reset.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from pathlib import Path
from types import TracebackType

_CHUNK = 1 << 16
_TURN_S = 0.02


class Wire:
    """Forwards each connection to ``front`` on to ``back``."""

    def __init__(self, front: Path, back: Path) -> None:
        self._back = str(back)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(front))
        self._listener.listen()
        self._open = threading.Event()
        self._open.set()
        self._closing = threading.Event()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="wire", daemon=True)

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()
        self._open.set()
        self._thread.join(10)
        for end in [*self._pairs, self._listener]:
            end.close()
        self._selector.close()

    def cut(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._open.wait()
            for key, _ in self._selector.select(_TURN_S):
                if not self._open.is_set():
                    break
                end = key.fileobj
                assert isinstance(end, socket.socket)
                if end is self._listener:
                    self._join(self._listener.accept()[0])
                elif end in self._pairs:
                    self._forward(end)

    def _join(self, front: socket.socket) -> None:
        back = socket.socket(socket.AF_UNIX)
        try:
            back.connect(self._back)
        except OSError:
            front.close()
            back.close()
            return
        for end, other in ((front, back), (back, front)):
            self._pairs[end] = other
            self._selector.register(end, selectors.EVENT_READ)

    def _forward(self, end: socket.socket) -> None:
        other = self._pairs[end]
        with contextlib.suppress(OSError):
            if data := end.recv(_CHUNK):
                other.sendall(data)
                return
        for side in (end, other):
            del self._pairs[side]
            self._selector.unregister(side)
            side.close()
