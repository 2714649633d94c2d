"""Hosts a deployment in this process, or in a daemon (``--detach``). `serve`, `up` and `router` share it.

Owns the output during the start. `orchestrator.control.host.deployment` owns the deployment itself, its start and its end.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn, cast

import typer

from orchestrator.cli.console import Console
from workers.logs import stamp
from workers.protocol.errors import TriremeError

if TYPE_CHECKING:
    from orchestrator.config.deployment_file import Config
    from orchestrator.control.host.notices import Notice
    from workers.protocol.messages import Capacity

#: Files in the deployment's run folder: the host's log, and the output of a detached host.
HOST_LOG, DAEMON_LOG = "host.log", "up.log"
POLL_S = 0.2
#: The time that :class:`TimedLines` writes before a line.
_TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")


def host_or_detach(console: Console, config: Config, detach: bool, *, routers_only: bool = False) -> None:
    """Host the deployment here until it ends, or start a daemon that hosts it and return when it is ready.

    ``routers_only``: start no replicas. Raises :class:`typer.Exit` with the host's exit code when that is not 0.
    """
    from orchestrator.control.host.lock import HostLock
    from orchestrator.files import make_private

    make_private(config.home)
    # Opening the logs empties them, so a deployment that already runs is found first.
    HostLock(config.home, config.name).release()
    code = host_in_daemon(console, config, routers_only) if detach else host(console, config, lambda: None, routers_only)
    if code:
        raise typer.Exit(code)


def host(console: Console, config: Config, on_ready: Callable[[], object], routers_only: bool = False) -> int:
    """Host the deployment until it ends, print its notices, and return its exit code.

    Calls ``on_ready`` once, when all replicas are ready. The host's own log is a file beside the logs of the routers and ranks.
    """
    import logging

    from orchestrator.cli.systemd import SystemdNotifier
    from orchestrator.control.host import deployment

    manager = SystemdNotifier(os.environ)
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(filename=config.home / HOST_LOG, filemode="w", level=logging.INFO, format=form)

    def notify(notice: Notice) -> None:
        print_notice(console, config, notice)
        if notice.kind == "ready":
            manager.ready(f"serving at {notice.text}")
            on_ready()
        elif notice.kind == "stopping":
            manager.stopping()

    with console.progress() as progress:
        return deployment.up(config, routers_only=routers_only, notify=notify, progress=progress, on_turn=manager.beat)


def print_notice(console: Console, config: Config, notice: Notice) -> None:
    """Print one line for a notice. When all is ready: the URL, a request that can be pasted, and the folder of the logs."""
    seconds = f", {notice.seconds:.1f} s" if notice.seconds else ""
    facts: dict[str, object] = {"kind": notice.kind, "subject": notice.subject, "seconds": round(notice.seconds, 1)}
    match notice.kind:
        case "warning":
            console.warn(f"{notice.subject}: {notice.text}", **facts)
        case "ready":
            console.say(f"{notice.subject} is ready{seconds}", url=notice.text, logs=str(config.home), **facts)
            if console.settings.log_format == "text":
                paste = curl(notice.text, config.models[0].name, keyed=bool(config.http.api_keys_file))
                console.say(f"  {notice.text}\n  {paste}\n  logs: {config.home}")
        case "replica" if notice.capacity is not None:
            console.say(f"replica {notice.subject}: {notice.text}{seconds}; {cache_size(notice.capacity)}", **facts)
        case "join":
            console.say(f"replicas join with {notice.text} and a pass: trireme keys join NAME --name {notice.subject}", **facts)
        case "stopping" | "stopped":
            console.say(f"{notice.subject}: {notice.text}", **facts)
        case _:
            console.say(f"{notice.kind} {notice.subject}: {notice.text}{seconds}", **facts)


def cache_size(capacity: Capacity) -> str:
    """The size of a KV cache in tokens, and in requests of the longest length."""
    tokens = capacity.block_size * capacity.num_blocks
    longest = capacity.max_seq_len
    return f"KV cache {tokens:,} tokens, {tokens / longest:.1f} requests of {longest:,} tokens at a time"


def curl(url: str, model: str, *, keyed: bool = False) -> str:
    """A request that works when pasted, with the caller's API key where the HTTP API needs one."""
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello!"}]})
    key = ' -H "Authorization: Bearer $TRIREME_API_KEY"' if keyed else ""
    return f"curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"


def host_in_daemon(console: Console, config: Config, routers_only: bool) -> int:
    """Fork a daemon that hosts the deployment. Return 0 when the deployment is ready, or the daemon's exit code if it ended before. Ctrl-C
    ends the daemon too."""
    log = config.home / DAEMON_LOG
    log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    ready_read, ready_write = os.pipe()
    child = os.fork()
    if not child:
        become_daemon(console, config, log_fd, ready_write, routers_only)
    os.close(log_fd)
    os.close(ready_write)
    try:
        return follow_until_ready(console, log, child, ready_read)
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        raise


def become_daemon(console: Console, config: Config, log_fd: int, ready_write: int, routers_only: bool) -> NoReturn:
    """Host the deployment in a session of its own, print to ``log_fd``, and end this forked process.

    Writes one byte to ``ready_write`` when the deployment is ready. The reader sees end of file when the process ended before.
    """
    code = 1
    try:
        os.setsid()
        for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log_fd), (2, log_fd)):
            os.dup2(source, target)
        console = Console(console.settings, stdout=sys.stdout, stderr=cast("IO[str]", TimedLines(sys.stderr)))
        try:
            code = host(console, config, lambda: os.write(ready_write, b"1"), routers_only)
        except TriremeError as error:
            code = console.fail(error)
    finally:
        os._exit(code)


class TimedLines:
    """The output of a daemon, with a time before each line of text, for `trireme logs`. Lines of JSON have their own time."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """``text``: whole lines."""
        now = stamp(time.time())
        self._stream.write("".join(line if line.startswith("{") else f"{now} {line}" for line in text.splitlines(keepends=True)))

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


class UntimedLines:
    """The same lines without the times, for the waiting user."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._rest = stream, ""

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        self._stream.write("".join(f"{_TIME.sub('', line)}\n" for line in lines))
        self._stream.flush()


def follow_until_ready(console: Console, log: Path, child: int, ready_read: int) -> int:
    """Print the daemon's output until it is ready (return 0) or has ended (return its exit code)."""
    shown = UntimedLines(console.stderr)
    with log.open() as lines, open(ready_read, "rb", buffering=0) as ready:
        ended = False
        while not ended:
            ended = bool(select.select([ready], [], [], POLL_S)[0])
            shown.write(lines.read())
        if ready.read(1):
            return 0
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        shown.write(lines.read())
    return code
