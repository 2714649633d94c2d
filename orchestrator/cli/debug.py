"""`trireme debug`: what routers did: dumps of their last events, and the story of one request. Owns only files and texts."""

from __future__ import annotations

import json
import os
import secrets
from datetime import datetime
from functools import partial
from pathlib import Path
from shutil import copyfileobj
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.command_group import CommandGroup
from orchestrator.cli.console import Console
from orchestrator.cli.running_deployments import DEFAULT_RUN_DIR, RunDir, pick
from workers.files import PRIVATE
from workers.protocol.errors import EnvironmentFault, NotFound, Rejected, TriremeError, Unavailable, from_code, printable

if TYPE_CHECKING:
    from orchestrator.router.core.history import ChoiceStory, RequestStory
    from orchestrator.router.core.stats import PlacementReason
    from orchestrator.router.diagnostics import StoryReport
    from workers.protocol.messages import Query

#: How long a router may take to write a dump, or to look for a request, milliseconds.
DUMP_MS, STORY_MS = 30_000, 2_000
#: Why a replica was chosen, in words.
CHOSEN: dict[PlacementReason, str] = {
    "only": "no other had room", "session": "the session ran there before", "prefix": "it probably holds the prefix",
    "load": "the least wait",
}  # fmt: skip

debug = typer.Typer(
    name="debug",
    cls=CommandGroup,
    help="Show what routers did: their last events, and the story of one request.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@debug.command()
def dump(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the deployment; needed if several run.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write; with several routers FILE.ROUTER.")
    ] = None,
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Write the last events of each router, with its state before them: `python -m orchestrator.sim --replay FILE` runs them again.

    A dump holds ids, counts and times; no prompt, no token, no text and no key.
    """
    import msgspec

    from orchestrator.router.diagnostics import DumpReport

    console: Console = context.obj
    reports = [msgspec.json.decode(body, type=DumpReport) for body in ask_routers(console, name, run_dir, "dump", DUMP_MS)]
    for report in reports:
        file = output or Path(f"{report.router}.dump")
        if output is not None and len(reports) > 1:
            file = output.with_name(f"{output.name}.{report.router}")
        copy(Path(report.path), file)
        console.say(f"{report.router}: {report.events} events", file=str(file))
        console.out(str(file))


@debug.command()
def story(
    context: typer.Context,
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="The id in the answer, or the client's own id.")],
    name: Annotated[str, typer.Option("--name", help="Name of the deployment; needed if several run.")] = "",
    form: Annotated[str, typer.Option("--output", "-o", metavar="json", help="Print everything as JSON.")] = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Show what happened to one request, in order: where it waited, which replicas ran it, and how it ended."""
    import msgspec

    from orchestrator.router.core.history import KEPT_REQUESTS
    from orchestrator.router.diagnostics import StoryReport

    console: Console = context.obj
    if form not in ("", "json"):
        raise Rejected(f"-o {form} is not a form", hint="use json")
    bodies = ask_routers(console, name, run_dir, "story", STORY_MS, request_id)
    reports = [report for body in bodies if (report := msgspec.json.decode(body, type=StoryReport)).stories]
    if not reports:
        why = f"it never came there, or it is no longer kept: a router keeps the last {KEPT_REQUESTS} requests since its start"
        raise NotFound(f"no router knows the request {printable(request_id)}", why, "trireme logs router")
    if form == "json":
        console.out(json.dumps(msgspec.to_builtins(reports), indent=2))
    else:
        console.out("\n\n".join("\n".join(tell(report, one)) for report in reports for one in report.stories))


def ask_routers(console: Console, name: str, run_dir: str, what: str, wait_ms: int, about: str = "") -> list[bytes]:
    """The answers of a deployment's routers; routers that do not answer are named on stderr. Raises the last error if no router answers."""
    import msgspec
    import zmq

    from orchestrator.control.host.router_poller import query
    from orchestrator.files import read_private
    from workers.protocol.messages import Failed, Query
    from workers.serving.router_io import KeyPair

    status = pick(name, run_dir).status()
    if not status.rpc:
        raise Unavailable(f"{status.name} has no router yet", hint=f"trireme status {status.name}")
    key = msgspec.json.decode(read_private(Path(status.key_file)), type=KeyPair)
    question: Query = msgspec.convert({"type": "query", "boot": secrets.token_hex(8), "stream": 1, "what": what, "about": about}, Query)
    answers: list[bytes] = []
    errors: list[TriremeError] = []
    zmq_context: zmq.Context[Any] = zmq.Context()
    try:
        for address in status.rpc:
            try:
                answer = query(zmq_context, address, key, question, wait_ms)
            except TriremeError as error:
                errors.append(error)
                continue
            if isinstance(answer, Failed):
                errors.append(from_code(answer.code, answer.message))
            elif answer is None:
                errors.append(EnvironmentFault(f"{address.endpoint} does not answer", f"waited {wait_ms / 1000:.0f} s", "trireme status"))
            else:
                answers.append(answer.body)
    finally:
        zmq_context.destroy(linger=0)
    if errors and not answers:
        raise errors[-1]
    for fault in errors:
        console.warn(str(fault))
    return answers


def copy(source: Path, file: Path) -> None:
    """Copy a dump into a file that only this user can read, because it names the requests of all tenants.

    Raises :class:`EnvironmentFault`, for example if the router runs on another host.
    """
    try:
        with source.open("rb") as dumped, open(file, "wb", opener=partial(os.open, mode=PRIVATE)) as out:
            copyfileobj(dumped, out)
    except OSError as error:
        where = error.filename or file
        raise EnvironmentFault(
            f"cannot copy the dump to {file}", f"{where}: {error.strerror}", f"it is {source} on the router's host"
        ) from None


def tell(report: StoryReport, found: RequestStory) -> list[str]:
    """The lines of one request's story."""
    moments = [(found.arrived_at, "accepted, and queued")]
    for index, choice in enumerate(found.choices):
        which = f"choice {index}: " if len(found.choices) > 1 else ""
        moments += [(at, which + text) for at, text in tell_choice(choice)]
    moments.sort(key=lambda moment: moment[0])
    caller = f" ({printable(found.caller_id)})" if found.caller_id else ""
    tokens = f"{found.prompt_tokens} prompt tokens, at most {found.max_tokens}"
    title = f"{printable(found.request_id)}{caller} at {report.router}: {found.model}, {tokens}"
    if found.client_attempt:
        title += f"; the client came here at its attempt {found.client_attempt}"
    clock = (datetime.fromtimestamp(report.unix_offset_s + at).strftime("%H:%M:%S.%f")[:-3] for at, _ in moments)
    lines = [title, *(f"  {time}  {at - found.arrived_at:+9.3f} s  {text}" for time, (at, text) in zip(clock, moments, strict=True))]
    live = [choice.phase for choice in found.choices if not choice.end]
    return [*lines, f"  now it is {', '.join(live)}"] if live else lines


def tell_choice(choice: ChoiceStory) -> list[tuple[float, str]]:
    """(time, what happened) to one choice, in order."""
    moments: list[tuple[float, str]] = []
    for index, attempt in enumerate(choice.attempts):
        if index:
            moments.append((attempt.queued_at, "queued again, before new requests"))
        if index == 1 and choice.dropped_attempts:
            moments.append((attempt.queued_at, f"{choice.dropped_attempts} attempts before this one are no longer kept"))
        tokens = f", after {attempt.emitted_before} tokens" if attempt.emitted_before else ""
        where = f"replica {attempt.replica} (epoch {attempt.epoch}), attempt {attempt.number}"
        moments.append((attempt.sent_at, f"sent to {where}{tokens}: {CHOSEN[attempt.placed_because]}"))
        if attempt.accepted_at:
            moments.append((attempt.accepted_at, f"acknowledged by {attempt.replica}"))
        if attempt.first_at:
            again = f"; asked again {attempt.reattached} times for tokens that were missed" if attempt.reattached else ""
            moments.append((attempt.first_at, f"first token from {attempt.replica}{again}"))
        if attempt.cause:
            moments.append((attempt.ended_at, f"lost at {attempt.replica}: {attempt.cause}"))
    if choice.end:
        moments.append((choice.ended_at, f"{choice.end}: {choice.detail}, {choice.output_tokens} tokens"))
    return moments
