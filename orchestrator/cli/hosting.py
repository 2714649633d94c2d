"""A deployment hosted by this process, or by a daemon of its own (``--detach``).

Owns what people see while they wait. What a deployment is, and how it starts and ends, belongs to `orchestrator.control.host.deployment`.
"""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from orchestrator.cli.console import Console
from workers.protocol.errors import TriremeError

if TYPE_CHECKING:
    from orchestrator.config.deployment_file import Config
    from orchestrator.control.host.deployment import Notice
    from workers.protocol.messages import Capacity

#: Files in the deployment's run folder: what the host logs, and what a detached host prints.
HOST_LOG, DAEMON_LOG = "host.log", "up.log"
POLL_S = 0.2


def run(console: Console, config: Config, detach: bool, *, standing: bool = False) -> None:
    """Host the deployment here until it ends, or in a daemon until it is ready. Ends the command with the host's exit code.

    ``standing``: its routers alone.
    """
    from orchestrator.control.launch.launcher import make_private

    make_private(config.home)
    code = detached(console, config, standing) if detach else host(console, config, lambda: None, standing)
    if code:
        raise typer.Exit(code)


def host(console: Console, config: Config, on_ready: Callable[[], object], standing: bool = False) -> int:
    """`orchestrator.control.host.deployment.up`, its notices told as they come. The host's own log goes to a file beside the others."""
    import logging

    from orchestrator.cli.systemd import ServiceManager
    from orchestrator.control.host import deployment

    manager = ServiceManager(os.environ)
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(filename=config.home / HOST_LOG, filemode="w", level=logging.INFO, format=form)

    def notify(notice: Notice) -> None:
        tell(console, config, notice)
        if notice.kind == "ready":
            manager.ready(f"serving at {notice.text}")
            on_ready()
        elif notice.kind == "stopping":
            manager.stopping()

    with console.progress() as progress:
        return deployment.up(config, standing=standing, notify=notify, progress=progress, beat=manager.beat)


def tell(console: Console, config: Config, notice: Notice) -> None:
    """One line a notice; when all is ready the three that people wait for: URL, something to paste, where the logs are."""
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
            console.say(f"replica {notice.subject}: {notice.text}{seconds}; {room(notice.capacity)}", **facts)
        case "join":
            console.say(f"replicas join with {notice.text} and a pass: trireme keys join NAME --name {notice.subject}", **facts)
        case "stopping" | "stopped":
            console.say(f"{notice.subject}: {notice.text}", **facts)
        case _:
            console.say(f"{notice.kind} {notice.subject}: {notice.text}{seconds}", **facts)


def room(capacity: Capacity) -> str:
    """The size of a KV cache as people plan with it."""
    tokens = capacity.block_size * capacity.num_blocks
    longest = capacity.max_seq_len
    return f"KV cache {tokens:,} tokens, {tokens / longest:.1f} requests of {longest:,} tokens at a time"


def curl(url: str, model: str, *, keyed: bool = False) -> str:
    """A request that works when pasted, with the caller's API key where the door needs one."""
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello!"}]})
    key = ' -H "Authorization: Bearer $TRIREME_API_KEY"' if keyed else ""
    return f"curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"


def detached(console: Console, config: Config, standing: bool) -> int:
    """Host in a forked daemon; return 0 when it is ready, or its exit code when it ended before. Ctrl-C until then ends it too."""
    log = config.home / DAEMON_LOG
    words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    hears, tells = os.pipe()
    child = os.fork()
    if not child:
        become_daemon(console, config, words, tells, standing)
    os.close(words)
    os.close(tells)
    try:
        return follow(console, log, child, hears)
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        raise


def become_daemon(console: Console, config: Config, words: int, tells: int, standing: bool) -> NoReturn:
    """The rest of this process's life: a host in a session of its own. A byte in ``tells``: it is ready; its closing: it ended."""
    code = 1
    try:
        os.setsid()
        for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, words), (2, words)):
            os.dup2(source, target)
        try:
            code = host(console, config, lambda: os.write(tells, b"1"), standing)
        except TriremeError as error:
            code = console.fail(error)
    finally:
        os._exit(code)


def follow(console: Console, log: Path, child: int, hears: int) -> int:
    """Repeat what the daemon says until it is ready or has ended."""
    with log.open() as lines, open(hears, "rb", buffering=0) as news:
        heard = False
        while not heard:
            heard = bool(select.select([news], [], [], POLL_S)[0])
            console.stderr.write(lines.read())
            console.stderr.flush()
        if news.read(1):
            return 0
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        console.stderr.write(lines.read())
    return code
