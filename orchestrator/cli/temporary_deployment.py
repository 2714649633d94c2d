"""A deployment of a file that lives as long as one command (`demo`, `verify`): it runs `trireme up` and `trireme down` as processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.console import Console
from workers.protocol.errors import EnvironmentFault, NotFound

if TYPE_CHECKING:
    from orchestrator.config.deployment_file import Config

COMMAND = [sys.executable, "-m", "trireme"]
READY_S = 240.0
STOP_S = 60.0
POLL_S = 0.2


@contextmanager
def temporary_deployment(console: Console, config: Config, file: Path, *, ready_s: float = READY_S) -> Iterator[str]:
    """Run `trireme up FILE` and give the URL when the deployment is ready; on exit run `trireme down` and wait until its host is gone.

    ``config``: what the file says, with a ``run_dir`` of the caller's own. A deployment of the user may have the same name, and this one
    must neither find its port taken nor ask it, nor end it. Raises :class:`EnvironmentFault` when either fails.
    """
    flags = ["--quiet"] if console.settings.quiet else []
    child = subprocess.Popen([*COMMAND, *flags, "up", str(file), "--run-dir", config.run_dir, "--port", "0"])
    try:
        yield wait_ready(child, config, ready_s)
        subprocess.run([*COMMAND, *flags, "down", config.name, "--run-dir", config.run_dir], check=True)
        code = _exit_code(child)
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            if _exit_code(child) is None:
                child.kill()
    if code is None:
        why = f"trireme up still ran {STOP_S:g} s after trireme down"
        raise EnvironmentFault("the deployment did not end", why, f"its log: {config.home}")
    if code:
        raise EnvironmentFault("the deployment did not end well", f"trireme up exited with {code}", f"its log: {config.home}")


def _exit_code(child: subprocess.Popen[bytes]) -> int | None:
    """The exit code of ``child``; None while it still runs after :data:`STOP_S`."""
    try:
        return child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        return None


def wait_ready(child: subprocess.Popen[bytes], config: Config, ready_s: float) -> str:
    """Return the URL when every replica is ready. Raises :class:`EnvironmentFault` when the deployment ends first or is late."""
    from orchestrator.control.host.control_socket import connect

    control = connect(config.name, config.run_dir)
    until = time.monotonic() + ready_s
    while time.monotonic() < until:
        if child.poll() is not None:
            raise EnvironmentFault(f"the deployment ended before it was ready (exit {child.returncode})", hint="its errors are above")
        try:
            if (status := control.status()).state == "READY":
                return status.url
        except (NotFound, EnvironmentFault):
            pass  # its control socket is not there yet
        time.sleep(POLL_S)
    raise EnvironmentFault(f"the deployment was not ready after {ready_s:.0f} s", hint="trireme doctor")
