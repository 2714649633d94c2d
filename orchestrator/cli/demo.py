"""`trireme demo`: starts the deployment of an example file, gets answers, and stops it, with the commands that a user would type.

Owns the two parts of the run. The first fetches and converts models. The second starts the deployment, gets answers over HTTP and RPC,
prints the status, stops everything, and checks that no process is left. It runs in a separate network and process namespace if the system
allows it, because Ray listens on all interfaces. Uses only commands, HTTP and RPC.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from orchestrator.cli.console import Console
from orchestrator.cli.generate_request import open_backend
from orchestrator.cli.temporary_deployment import COMMAND, temporary_deployment
from orchestrator.files import SHIPPED
from workers.protocol.errors import ReplicaLost

if TYPE_CHECKING:
    from orchestrator.config.deployment_file import Config

QUESTION = "What is the capital of France?"
EXAMPLE = SHIPPED / "examples" / "local.yaml"
POLL_S = 0.2
GONE_S = 10.0
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


def demo(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A deployment file.", show_default="deploy/examples/local.yaml")] = EXAMPLE,
    inside: Annotated[bool, typer.Option("--inside", hidden=True, help="The second part, in a namespace.")] = False,
    isolate: Annotated[bool, typer.Option(help="Run the deployment in a separate network if the system allows it.")] = True,
) -> None:
    """Fetch and convert a model, start it, ask over HTTP and ZeroMQ, show the status, stop, and check that no process is left."""
    console: Console = context.obj
    if inside:
        run_inside(console, file)
        return
    found = prepare(console, file)
    namespace = find_namespace() if isolate else []
    if not namespace and found.launcher == "ray":
        console.warn("Ray runs in this machine's network and listens on all interfaces while the demo lasts (token authentication is on)")
    flags = ["--quiet"] if console.settings.quiet else []
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # the demo starts a Ray of its own
    raise typer.Exit(subprocess.run([*namespace, *COMMAND, *flags, "demo", "--inside", str(file)], env=env, check=False).returncode)


def prepare(console: Console, file: Path) -> Config:
    """Fetch and convert what the file's replicas need, so that the second part needs no network."""
    from orchestrator.config import deployment_file
    from orchestrator.control.host.deployment_plan import prepare_models
    from orchestrator.control.launch import node_hardware
    from orchestrator.planner.automatic import ClusterHardware

    found = deployment_file.load(file, env=os.environ).config
    hardware = ClusterHardware(nodes=(node_hardware.look(os.environ, gpus=True),))
    started = time.monotonic()
    with console.progress() as progress:
        models = prepare_models(found.models, hardware, found.cache, progress)
    for served in models:
        console.say(f"{served.config.name}: {time.monotonic() - started:.1f} s")
        for gang in served.gangs:
            console.say(f"  {gang.name}, tp={gang.parallel.tp} pp={gang.parallel.pp}: {gang.artifact}")
    return found


def find_namespace() -> list[str]:
    """The command that runs another one in a new network and process namespace; empty if that is not allowed."""
    from orchestrator.cli.doctor_checks import NAMESPACE_COMMANDS, attempt

    return next((argv for argv in NAMESPACE_COMMANDS if attempt([*argv, "true"], timeout=10.0).code == 0), [])


def run_inside(console: Console, file: Path) -> None:
    from orchestrator.config import deployment_file
    from orchestrator.control.launch.subprocesses import adopt_orphans

    run_dir = tempfile.mkdtemp(prefix="trireme-demo-")  # it stays when the demo fails, for its logs
    config = msgspec.structs.replace(deployment_file.load(file, env=os.environ).config, run_dir=run_dir)
    adopt_orphans()  # so none can hide from `survivors`
    raise_loopback()
    with temporary_deployment(console, config, file) as url:
        answer(console, config, url, "HTTP", rpc=False)
        answer(console, config, url, "ZeroMQ RPC", rpc=True)
        console.say("")
        subprocess.run([*COMMAND, "status", config.name, "--run-dir", config.run_dir, "-o", "wide"], check=True)
        console.say("")
    if left := survivors():
        raise ReplicaLost(f"{len(left)} processes outlived the deployment", "; ".join(left), "this is a bug: please report it")
    shutil.rmtree(run_dir, ignore_errors=True)
    console.say("everything is shut down; no process is left")


def answer(console: Console, config: Config, url: str, title: str, *, rpc: bool) -> None:
    """Ask the question over HTTP or RPC and print the answer, with the time to its first piece."""
    with closing(open_backend("" if rpc else url, rpc, config.name if rpc else "", config.run_dir)) as backend:
        body = {"model": config.models[0].name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32, "temperature": 0.0}
        console.say(f"\n{title}: {QUESTION}")
        started, first = time.monotonic(), 0.0
        for piece in backend.stream("chat", body):
            first = first or time.monotonic() - started
            console.out(piece, end="")
        console.out()
        if not first:
            raise ReplicaLost(f"no answer came over {title}", hint="this is a bug: please report it")
        total = time.monotonic() - started
        console.say(f"  first piece after {1000 * first:.0f} ms, all after {total:.2f} s", api=title, first_s=round(first, 3))


def survivors() -> list[str]:
    """Descendants of this process that still live after a grace for those that are ending: ``pid name``."""
    import psutil

    until = time.monotonic() + GONE_S
    while True:
        left = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    left.append(f"{process.pid} {process.name()}")
            except psutil.NoSuchProcess:
                continue
        if not left or time.monotonic() > until:
            return left
        time.sleep(POLL_S)


def raise_loopback() -> None:
    """Bring ``lo`` up if it is down, as in a new network namespace. Interface flags: struct ifreq of netdevice(7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack("16sh22x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        if not flags & IFF_UP:
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | IFF_UP))
