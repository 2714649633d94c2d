"""The control socket of a deployment: what ``trireme status``, ``top``, ``drain``, ``update`` and ``down`` send to it and what they print.

The commands run against a bare socket that gives fixed answers. ``commands.txt``: what is typed, sent and shown. ``server.json``: what the
real server answers to orders. Record again: ``python -m tests.recorded.record control``.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.control.host.control_socket import ControlCommand, ControlReply, ControlServer
from tests.recorded import lines
from tests.recorded.recording import as_json, as_text, check, check_names
from tests.support.gang import short_folder
from tests.support.tiny_models import tiny_model
from workers.protocol.errors import NotFound

AREA = "control"
NAMES = ["commands.txt", "status.json", "server.json"]
BOUND_S = 60.0
#: A process that cannot be: `trireme down` waits for its end.
NOBODY = 2**22 + 1
CAPACITY = {
    "block_size": 16, "num_blocks": 1024, "max_batch_size": 16, "max_num_tokens": 256, "max_seq_len": 8192, "vocab_size": 320, "tp": 2,
    "pp": 1, "guided": True, "max_logprobs": 20, "engine": "fake", "dtype": "fp32", "prefix_cache": True,
    "quant": {"quant_algo": None, "kv_cache_quant_algo": None, "group_size": None, "has_zero_point": False, "pre_quant_scale": False,
              "exclude_modules": None},
}  # fmt: skip
READY_ROW = {
    "name": "tiny-0", "model": "tiny", "state": "READY", "age_s": 200.0, "tp": 2, "pp": 1, "queue": 1, "running": 3, "tok_s": 12.5,
    "kv_use": 0.25, "nodes": 1, "hosts": ["here"], "epoch": 7, "restarts": 3, "failures": 0, "retry_in_s": 0.0, "cause": "", "hint": "",
    "pids": [[0, "here", 101], [1, "here", 102]], "capacity": CAPACITY, "log_dir": "/run/small/tiny-0",
}  # fmt: skip
LOST_ROW = {
    "name": "tiny-1", "model": "tiny", "state": "BACKOFF", "age_s": 30.0, "tp": 2, "pp": 1, "queue": 0, "running": 0, "tok_s": 0.0,
    "kv_use": 0.0, "nodes": 0, "hosts": [], "epoch": 8, "restarts": 5, "failures": 2, "retry_in_s": 4.0, "cause": "rank 1 was killed",
    "hint": "look at its log", "pids": [], "capacity": None, "log_dir": "/run/small/tiny-1",
}  # fmt: skip
UPDATE = {
    "phase": "done", "moves": ["replace tiny-0", "add tiny-2"], "steps": [["replace tiny-0", 1.5], ["add tiny-2", 2.0]], "doing": "",
    "left": 0, "error": "", "seconds": 3.5,
}  # fmt: skip
ROLLING = UPDATE | {"phase": "rolling", "steps": [["replace tiny-0", 1.5]], "doing": "add tiny-2", "left": 1}


def status(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    ready = sum(row["state"] == "READY" for row in rows)
    state = "READY" if ready == len(rows) else "DEGRADED"
    model = {
        "name": "tiny", "state": state, "age_s": 200.0, "wanted": len(rows), "ready": ready, "tp": [2], "pp": [1], "queue": 4,
        "tok_s": 12.5, "nodes": 1, "replicas": rows, "admitted": 90,
    }  # fmt: skip
    return {
        "name": "small", "state": state, "age_s": 200.0, "pid": NOBODY, "launcher": "local", "url": "http://127.0.0.1:8000",
        "models": [model], "routers": {"router0": 100}, "rpc": [{"endpoint": "ipc:///run/small/rpc", "server_key": ""}],
        "run_dir": "/run/small", "key_file": "/run/small/keys/client-local.json", "error": "", "update": None, **fields,
    }  # fmt: skip


WELL = status([READY_ROW])
ILL = status([READY_ROW, LOST_ROW], error="tiny-1: rank 1 was killed", update=ROLLING)
UPDATED = status([READY_ROW], update=UPDATE)
FILE = "name: small\nmodels:\n  - name: tiny\n    path: tiny\n    engine: fake\n    tp_size: 2\n    replicas: 2\n"
REFUSED = {"code": "not_found", "message": "no replica tiny-9", "hint": "there is tiny-0"}
HARDWARE = {"nodes": [{"gpus": [], "memory": 16 << 30, "cores": 2}]}
#: (what is typed, what the socket answers to ``status``, and to anything else).
COMMANDS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("status", WELL, {}),
    ("status small -o wide", WELL, {}),
    ("status -o yaml", WELL, {}),
    ("status", ILL, {}),
    ("status -o wide", ILL, {}),
    ("top --once --every 0.2", WELL, {}),
    ("drain tiny-0", WELL, {}),
    ("drain small/tiny-0", WELL, {}),
    ("drain tiny-9", WELL, REFUSED),
    ("update small.yaml --dry-run", WELL, {"update": ROLLING, "hardware": HARDWARE}),
    ("update small.yaml", UPDATED, {"update": ROLLING, "hardware": HARDWARE}),
    ("down", WELL, {}),
    ("down small --now", WELL, {}),
]


class Socket:
    """Listens as a deployment's host does, and answers with what it is given. ``orders``: what was sent, as it came."""

    def __init__(self, path: Path, status: dict[str, Any], other: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True)
        self._status, self._other = status, other
        self.orders: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            with connection, connection.makefile("rwb") as stream:
                order = stream.readline().decode().rstrip("\n")
                self.orders.append(order)
                answer = {"status": self._status} if json.loads(order)["do"] == "status" else self._other
                stream.write(json.dumps(answer).encode() + b"\n")

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(BOUND_S)


def commands(folder: Path) -> tuple[str, str]:
    """(all commands as text, what ``status -o json`` prints). Each command has a run folder and a host of its own."""
    (folder / "small.yaml").write_text(FILE)
    tiny_model(folder / "tiny")
    asked = [*COMMANDS, ("status -o json", ILL, {})]
    places = [folder / f"run{index}" for index in range(len(asked))]
    with contextlib.ExitStack() as stack:
        hosts = [
            stack.enter_context(Socket(place / "small" / "control.sock", state, other))
            for place, (_, state, other) in zip(places, asked, strict=True)
        ]
        typed = [[*shlex.split(line), "--run-dir", str(place)] for place, (line, _, _) in zip(places, asked, strict=True)]
        ran = lines.run(typed, folder)
    blocks = []
    for place, host, one, (line, _, _) in zip(places, hosts, ran, asked, strict=True):
        rows = [f"$ trireme {line}", *(f"sent| {row}" for order in host.orders for row in spread(order).splitlines())]
        rows += [f"{stream}| {row.rstrip()}" for stream, text in (("out", one.out), ("err", one.err)) for row in text.splitlines()]
        blocks.append("\n".join([*rows, f"exit code {one.code}", ""]).replace(str(place), "<runs>").replace(str(folder), "<folder>"))
    return re.sub(r"\b[0-9]+\.[0-9] s\b", "<time> s", "\n".join(blocks[:-1])), ran[-1].out


def spread(order: str) -> str:
    """A long one is shown over several lines."""
    return order if len(order) < 100 else json.dumps(json.loads(order), indent=1)


def server(folder: Path) -> list[dict[str, Any]]:
    """The real server: what it answers to a line."""

    def handle(order: ControlCommand) -> ControlReply:
        if order.do == "drain":
            raise NotFound("no replica tiny-9", "there is tiny-0", "trireme status")
        return msgspec.convert({"status": ILL} if order.do == "status" else {}, ControlReply)

    path = folder / "server.sock"
    made = ControlServer(path, handle)
    found = []
    try:
        for line in (
            '{"do":"status"}',
            '{"do":"drain","name":"tiny-9"}',
            '{"do":"down","now":true}',
            '{"do":"dance"}',
            "no JSON",
            '{"do":"down","x":1}',
        ):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(BOUND_S)
                connection.connect(str(path))
                with connection.makefile("rwb") as stream:
                    stream.write(line.encode() + b"\n")
                    stream.flush()
                    found.append({"sent": line, "answer": json.loads(stream.readline())})
    finally:
        made.close()
    return found


def recordings() -> dict[str, str]:
    with short_folder() as folder:
        text, shown = commands(folder)
        return {"commands.txt": as_text(text), "status.json": as_text(shown), "server.json": as_json(server(folder))}


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return recordings()


@pytest.mark.parametrize("name", NAMES)
def test_orders_and_answers_are_as_recorded(name: str, now: dict[str, str]) -> None:
    check(AREA, name, now[name])


def test_nothing_is_lost_between_the_socket_and_the_terminal(now: dict[str, str]) -> None:
    assert json.loads(now["status.json"]) == [ILL]


def test_nothing_else_is_recorded() -> None:
    check_names(AREA, NAMES)
