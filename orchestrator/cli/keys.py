"""`trireme keys`: access to a deployment: API keys for HTTP, CURVE key pairs for RPC over tcp, and a list of key files.

A key is printed once, when it is made, on stdout only; nothing else here prints a secret.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.command_group import CommandGroup
from orchestrator.cli.console import Console, age, table
from orchestrator.cli.running_deployments import DEFAULT_RUN_DIR, NAME_ONE, RunDir, the_only_one

if TYPE_CHECKING:
    from orchestrator.auth.api_keys import KeyTerms
    from orchestrator.auth.keyring import ApiKeyRing
    from orchestrator.router.key_limits import KeyUsage

API_KEYS = "api.json"
#: How long a router's answer is awaited, milliseconds.
USAGE_MS = 2000
#: The name of a deployment without a configured name.
FIRST = "local"

keys = typer.Typer(name="keys", cls=CommandGroup, help="Manage access to a deployment.", no_args_is_help=True)
api = typer.Typer(name="api", cls=CommandGroup, help="API keys of the HTTP API.", no_args_is_help=True)
keys.add_typer(api)

Deployment = Annotated[
    str, typer.Option("--name", help=f"Name of the deployment, running or not; needed if there are several, {FIRST} if there is none.")
]
File = Annotated[Path | None, typer.Option("--file", help="The API-keys file; by default api.json among the deployment's keys.")]
Models = Annotated[list[str] | None, typer.Option("--models", help="A model that it may use; repeatable. By default all.")]
Tenant = Annotated[str, typer.Argument(help="The tenant: keys of one tenant share its prefix cache.")]
Which = Annotated[str, typer.Argument(help="A key's id, or a tenant (all its keys).")]
Rpm = Annotated[int | None, typer.Option("--rpm", min=0, help="Requests that it may make in any minute; 0 = no limit.")]
Tpm = Annotated[int | None, typer.Option("--tpm", min=0, help="Tokens, of prompts and answers, in any minute; 0 = no limit.")]
AtOnce = Annotated[int | None, typer.Option("--concurrency", min=0, help="Requests at once; 0 = no limit.")]
Weight = Annotated[
    float | None, typer.Option("--weight", min=0.001, max=1000, help="Its tenant's share of the service beside those that weigh 1.")
]
Priority = Annotated[
    int | None, typer.Option("--priority", min=-9, max=9, help="The smallest priority that its requests may have; by default 0.")
]


def folder(name: str, run_dir: str) -> Path:
    """The key files of the deployment ``name``. Without a name: of the only running deployment, else of the only one that has keys, else of
    the one that the next `trireme serve` would start. Raises :class:`Rejected` if several are possible."""
    from workers.protocol.errors import Rejected

    home = Path(run_dir).expanduser().absolute()
    if not name and (running := the_only_one(run_dir, NAME_ONE)) is not None:
        name = running.name
    if not name:
        known = sorted(path.parent.name for path in home.glob("*/keys") if path.is_dir())
        if len(known) > 1:
            raise Rejected(f"{len(known)} deployments have keys here", ", ".join(known), NAME_ONE)
        name = known[0] if known else FIRST
    return home / name / "keys"


def ring(file: Path | None, name: str, run_dir: str) -> ApiKeyRing:
    from orchestrator.auth.keyring import ApiKeyRing

    return ApiKeyRing((file or folder(name, run_dir) / API_KEYS).expanduser().absolute())


def listed(models: list[str] | None) -> list[str]:
    """The names of a flag: the flag may be repeated, and a value may hold several names separated by commas."""
    return [name for part in models or () for name in part.split(",") if name]


def changed_terms(
    terms: KeyTerms, rpm: int | None, tpm: int | None, at_once: int | None, weight: float | None, priority: int | None
) -> KeyTerms:  # fmt: skip
    """``terms`` with what was given; a limit of 0 is none. Raises :class:`Rejected`."""
    import msgspec

    from orchestrator.auth.api_keys import KeyTerms
    from workers.protocol.errors import Rejected

    limits = {name: value or None for name, value in (("rpm", rpm), ("tpm", tpm), ("concurrency", at_once)) if value is not None}
    others = {name: value for name, value in (("weight", weight), ("most_urgent", priority)) if value is not None}
    changed = msgspec.structs.replace(terms, limits=msgspec.structs.replace(terms.limits, **limits), **others)
    try:
        return msgspec.convert(msgspec.to_builtins(changed), KeyTerms)
    except msgspec.ValidationError as error:
        raise Rejected("a limit is out of range", str(error), "limits are at most 1,000,000,000,000") from None


def shown_terms(terms: KeyTerms) -> str:
    """As `keys api list` shows it."""
    limits = (("rpm", terms.limits.rpm), ("tpm", terms.limits.tpm), ("at once", terms.limits.concurrency))
    parts = [f"{value} {name}" for name, value in limits if value is not None]
    parts += [f"weight {terms.weight:g}"] if terms.weight != 1 else []
    parts += [f"priority {terms.most_urgent}"] if terms.most_urgent else []
    return ", ".join(parts) or "-"


@api.command("add")
def api_add(
    context: typer.Context,
    tenant: Tenant,
    models: Models = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: AtOnce = None,
    weight: Weight = None,
    priority: Priority = None,
    file: File = None,
    name: Deployment = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Make an API key and print it once: only its hash is stored."""
    from orchestrator.auth.api_keys import USUAL_TERMS

    console: Console = context.obj
    found = ring(file, name, run_dir)
    console.out(found.add(tenant, listed(models), changed_terms(USUAL_TERMS, rpm, tpm, concurrency, weight, priority)))
    console.say(f"its hash is in {found.path}; routers read that file when http.api_keys_file names it")


@api.command("list")
def api_list(context: typer.Context, file: File = None, name: Deployment = "", run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """Show the valid keys, without their secrets."""
    rows = ring(file, name, run_dir).rows()
    now = time.time()
    lines = [
        [row.id, row.tenant, ",".join(row.models) if row.models is not None else "all", age(now - row.created), shown_terms(row.terms)]
        for row in rows
    ]
    context.obj.out(table(["ID", "TENANT", "MODELS", "AGE", "LIMITS"], lines))


@api.command("limit")
def api_limit(
    context: typer.Context,
    which: Which,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: AtOnce = None,
    weight: Weight = None,
    priority: Priority = None,
    file: File = None,
    name: Deployment = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Change the limits of keys; options that are not given change nothing. Routers follow within two seconds."""
    changed = ring(file, name, run_dir).change(which, lambda terms: changed_terms(terms, rpm, tpm, concurrency, weight, priority))
    context.obj.say(f"changed: {', '.join(f'{row.id} ({row.tenant})' for row in changed)}")


@api.command("revoke")
def api_revoke(
    context: typer.Context,
    which: Which,
    file: File = None,
    name: Deployment = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Revoke keys; routers refuse them within two seconds."""
    gone = ring(file, name, run_dir).revoke(which)
    context.obj.say(f"revoked: {', '.join(f'{row.id} ({row.tenant})' for row in gone)}")


@keys.command("usage")
def usage(
    context: typer.Context,
    form: Annotated[str, typer.Option("--output", "-o", metavar="json", help="The answers of all routers, as JSON.")] = "",
    name: Deployment = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Show what each API key has used since the routers' start, and how much of its limits in the last minute."""
    import msgspec

    from orchestrator.cli.debug import ask_routers
    from orchestrator.router.diagnostics import UsageReport
    from workers.protocol.errors import Rejected

    console: Console = context.obj
    if form not in ("", "json"):
        raise Rejected(f"-o {form} is not a form", hint="use json")
    reports = [msgspec.json.decode(body, type=UsageReport) for body in ask_routers(console, name, run_dir, "usage", USAGE_MS)]
    if form == "json":
        console.out(json.dumps(msgspec.to_builtins(reports), indent=2))
        return
    by_key: dict[str, list[KeyUsage]] = {}
    for one in (one for report in reports for one in report.keys):
        by_key.setdefault(one.key, []).append(one)
    console.out(
        table(["KEY", "TENANT", "REQUESTS", "REFUSED", "PROMPT", "OUTPUT", "RUNNING", "MINUTE"], [used(each) for each in by_key.values()])
    )


def used(usages: list[KeyUsage]) -> list[str]:
    """The row of one key. Totals are sums over the routers. Each router knows the whole last minute by itself; the one that knows most is
    shown."""
    of = max(usages, key=lambda one: (one.minute_requests, one.minute_tokens))
    minute = [f"{of.minute_requests}/{of.limits.rpm} requests"] if of.limits.rpm is not None else []
    minute += [f"{of.minute_tokens}/{of.limits.tpm} tokens"] if of.limits.tpm is not None else []
    totals = [
        sum(one.requests for one in usages), sum(sum(one.refused.values()) for one in usages), sum(one.prompt_tokens for one in usages),
        sum(one.output_tokens for one in usages), sum(one.running for one in usages),
    ]  # fmt: skip
    return [of.key, of.tenant, *map(str, totals), ", ".join(minute) or "-"]


@keys.command("client")
def client(
    context: typer.Context,
    tenant: Annotated[str, typer.Argument(metavar="NAME", help="Name of the client and of its tenant.")],
    models: Models = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="Revoke the client and remove its key pair.")] = False,
    name: Deployment = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Make a CURVE key pair for an RPC client over tcp and authorize it; prints the path of the client's key file."""
    from orchestrator.auth.keyring import KeyRing

    console: Console = context.obj
    found = KeyRing(folder(name, run_dir))
    if revoke:
        found.remove_client(tenant)
        console.say(f"the client {tenant} is no longer allowed")
        return
    console.out(str(found.admit_client(tenant, listed(models))))
    console.say(f"the routers' public key: {found.pair('router', 'all').public}")


@keys.command("join")
def join(
    context: typer.Context,
    holder: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the pass; the names of its replicas at the routers begin with it.")
    ],
    models: Models = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="Revoke the pass and remove it.")] = False,
    name: Deployment = "",
    run_dir: RunDir = DEFAULT_RUN_DIR,
) -> None:
    """Let replicas of another deployment join these routers; prints the path of the pass, a secret file (join.key_file)."""
    from orchestrator.auth.keyring import KeyRing

    console: Console = context.obj
    found = KeyRing(folder(name, run_dir))
    if revoke:
        found.remove_pass(holder)
        console.say(f"the replicas of {holder} are no longer allowed")
        return
    console.out(str(found.admit_replicas(holder, listed(models))))


@keys.command("show")
def show(context: typer.Context, name: Deployment = "", run_dir: RunDir = DEFAULT_RUN_DIR) -> None:
    """List the deployment's key files with purpose and mode. Exit code 3 if other users can read one."""
    from orchestrator.auth.curve_acl import FAMILY, parse_grants
    from workers.protocol.errors import ConfigError, NotFound

    home = folder(name, run_dir)
    if not home.is_dir():
        raise NotFound(f"there are no keys of {home.parent.name}", f"{home} does not exist", "trireme up makes them")
    modes = {path: path.stat().st_mode & 0o777 for path in sorted(home.iterdir()) if path.is_file()}
    grants = parse_grants((home / "allowed.json").read_bytes()) if home / "allowed.json" in modes else {}
    limits = {grant.name: ",".join(grant.models) for grant in grants.values() if grant.role == "client" and grant.models is not None}
    rows = []
    for path, mode in modes.items():
        role, _, owner = path.stem.partition("-")
        use = {"salt": "prefix-cache salt", "allowed": "public keys and roles", "api": "hashes of API keys"}.get(
            role, f"pass for the replicas of {owner}" if role == "pass" else f"key pair of {role} {owner}"
        )
        bound = {"client": owner, "pass": owner + FAMILY}.get(role)
        rows.append([path.name, f"{mode:04o}", use, "-" if bound is None else limits.get(bound, "all")])
    context.obj.out(table(["FILE", "MODE", "WHAT", "MODELS"], rows))
    if loose := [path for path, mode in modes.items() if mode & 0o077]:
        raise ConfigError(f"{loose[0]} can be read by others", hint=f"chmod 600 {' '.join(map(str, loose))}")
