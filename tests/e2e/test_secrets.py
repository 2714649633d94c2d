"""One keyed deployment from the command line: tenants over HTTP, and no secret anywhere but in files that are their owner's alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from orchestrator.auth.api_keys import Salting
from tests.support.deployment import MODEL, deployed, write_config
from tests.support.gang import short_folder

PROMPT = "planted prompt of a patient " * 8
WRONG = "trireme-0123456789ab-" + "planted" * 8


def trireme(*line: str, code: int = 0, **env: str) -> str:
    command = [sys.executable, "-m", "trireme", *line]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | env)
    assert ran.returncode == code, ran.stderr
    return ran.stdout + (ran.stderr if code else "")


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def planted(folder: Path, keys: list[str]) -> dict[str, bytes]:
    """What must not be seen, by a name that may be: API keys, CURVE secrets, the salt key and what it makes, prompts."""
    found = {f"API key {index}": key.rpartition("-")[2].encode() for index, key in enumerate([*keys, WRONG])}
    for path in (folder / "keys").glob("*-*.json"):
        found[path.name] = json.loads(path.read_bytes())["secret"].encode()
    key = (folder / "keys" / "salt").read_bytes()
    found |= {"salt": key, "salt in hex": key.hex().encode(), "a tenant's salt": Salting(key).of("alice", "").encode()}
    return found | {"prompt": b"planted prompt"}


def leaks(secrets: dict[str, bytes], seen: dict[str, bytes]) -> list[str]:
    return [f"{name} in {where}" for where, content in seen.items() for name, secret in secrets.items() if secret in content]


def ask(url: str, key: str, **fields: object) -> httpx.Response:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, "ignore_eos": True, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=60)


def cached(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_keys_open_the_door_and_stay_out_of_sight() -> None:
    with short_folder() as folder:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        where = ("--name", "e2e", "--run-dir", str(folder / "run"))
        home = folder / "run" / "e2e"
        alice, bob, eve = (trireme("keys", "api", "add", name, *limit, *where).strip() for name, limit in (
            ("alice", ()), ("bob", ("--models", MODEL)), ("eve", ("--models", "other")),
        ))  # fmt: skip
        trireme("keys", "client", "inside", *where)
        deployment = {
            "http": {"host": "127.0.0.1", "port": 0, "api_keys_file": str(home / "keys" / "api.json")},
            "rpc": {"host": "127.0.0.1", "port": port},
        }
        file = write_config(folder, deployment=deployment, replicas=1)
        with deployed(file) as (_, status):
            url = status.url
            assert cached(ask(url, alice)) == 0 and cached(ask(url, alice)) > 0
            assert cached(ask(url, bob)) == 0, "another tenant's prefix was seen"
            seen = {
                f"error {index}": answer.content + str(answer.headers).encode()
                for index, answer in enumerate(
                    [
                        ask(url, WRONG), ask(url, eve), ask(url, alice, temperature="hot"), ask(url, alice, max_tokens=10**9),
                        ask(url, alice, model=alice + "x" * 300), ask(url, alice, stop=[PROMPT * 9]),
                        httpx.get(f"{url}/v1/models?key={WRONG}", trust_env=False),
                    ]
                )
            }  # fmt: skip
            assert trireme("chat", "hi", "--url", url, "--max-tokens", "2", TRIREME_API_KEY=alice)
            assert "authentication" not in trireme("chat", "hi", "--rpc", *where)
            seen["a refused command"] = trireme("chat", "hi", "--url", url, code=2, TRIREME_API_KEY=WRONG).encode()
            seen["/metrics"] = httpx.get(f"{url}/metrics", trust_env=False).content
            seen["status"] = trireme("status", "e2e", "-o", "json", "--run-dir", str(folder / "run")).encode()
            seen["config"] = trireme("config", "show", str(file), "--resolved").encode()
            seen["keys"] = (trireme("keys", "show", *where) + trireme("keys", "api", "list", *where)).encode()
            host = psutil.Process(status.pid)
            family = [host, *host.children(recursive=True)]
            assert len(family) >= 5, "host, router, its cells, mpiexec and a rank"
            for process in family:
                name = f"process {process.pid}"
                seen[f"{name}: ps"] = " ".join(process.cmdline()).encode()
                seen[f"{name}: environment"] = json.dumps(process.environ()).encode()
            trireme("keys", "api", "revoke", "bob", *where)
        secrets = planted(home, [alice, bob, eve])
        assert len(secrets) >= 10
        # Key files hold their own secrets and are private; whatever others can read, and every log, holds none.
        for path in files(folder):
            private = path.stat().st_mode & 0o077 == 0
            if not private or path.suffix in (".log", ".yaml") or path.parent.name == "routers":
                seen[str(path)] = path.read_bytes()
            assert private or "keys" not in path.parts, f"{path} is open to others"
        assert sum(name.endswith(".log") for name in seen) >= 3, "host, router and rank write logs"
        assert leaks(secrets, seen) == []
        kept = {str(path): path.read_bytes() for path in files(folder)}
        assert not [leak for leak in leaks(secrets, kept) if leak.startswith(("API key", "prompt", "a tenant"))]
