"""A hub on loopback that speaks the HTTP API of Hugging Face's: model info, files with ETags and ranges, LFS files behind a redirect to
another port, gated and private models. It counts what it is asked, and can cut or hold an answer."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

COMMIT = "a" * 40
LARGE = (".safetensors", ".gguf", ".bin")


class HubRepo(msgspec.Struct, kw_only=True):
    """One model. ``gated``: only for ``tokens``, but its facts are public; ``private``: unknown to others. ``wrong``: files that are sent
    with other bytes than their hashes say."""

    files: dict[str, bytes]
    revisions: dict[str, str] = msgspec.field(default_factory=lambda: {"main": COMMIT})
    gated: bool = False
    private: bool = False
    tokens: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


class HubRequest(NamedTuple):
    method: str
    path: str
    range: str
    authorization: str


class Hub:
    """``cut_after``: the connection of a large file ends after so many bytes, once each time it is set. ``hold_after``: it stands still."""

    def __init__(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.store = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        self.repos: dict[str, HubRepo] = {}
        self.requests: list[HubRequest] = []
        self.cut_after: int | None = None
        self.hold_after: int | None = None
        self.released = threading.Event()

    def downloads(self) -> list[HubRequest]:
        """The requests that asked for bytes of a file."""
        return [each for each in self.requests if each.method == "GET" and not each.path.startswith("/api/")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = HubRequest(self.command, self.path, self.headers.get("Range", ""), self.headers.get("Authorization", ""))
        self.hub.requests.append(asked)
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if path[:2] == ["api", "models"]:
            self._info("/".join(path[2:4]), "/".join(path[5:]) or "main")
        elif path[0] == "cdn":
            repo, name = self.hub.repos["/".join(path[1:3])], "/".join(path[3:])
            self._file(repo, name, {"ETag": '"store"'})
        elif path[2:3] != ["resolve"]:
            self._error(404, "", "no such page")
        else:
            self._resolve("/".join(path[:2]), path[3], "/".join(path[4:]))

    do_HEAD = do_GET  # noqa: N815

    def _known(self, repo_id: str, revision: str) -> tuple[HubRepo, str] | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._trusted(repo)):
            return self._error(401 if repo is None else 404, "RepoNotFound", "Repository not found")
        commit = revision if revision in repo.revisions.values() else repo.revisions.get(revision)
        return (repo, commit) if commit else self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _trusted(self, repo: HubRepo) -> bool:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") in repo.tokens

    def _info(self, repo_id: str, revision: str) -> None:
        if known := self._known(repo_id, revision):
            repo, commit = known
            body = {"id": repo_id, "sha": commit, "siblings": [_sibling(name, data) for name, data in repo.files.items()]}
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        if (known := self._known(repo_id, revision)) is None:
            return
        repo, commit = known
        if repo.gated and not self._trusted(repo):
            self._error(403 if self.headers.get("Authorization") else 401, "GatedRepo", f"Access to model {repo_id} is restricted")
            return
        facts = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(repo.files[name])}"'}
        if name.endswith(LARGE):
            data = repo.files[name]
            facts |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            self._send(302, b"", facts | {"Location": f"{self.hub.store}/cdn/{repo_id}/{name}"})
        else:
            self._file(repo, name, facts)

    def _file(self, repo: HubRepo, name: str, facts: dict[str, str]) -> None:
        data, begin = repo.files[name], 0
        if name in repo.wrong:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if asked := self.headers.get("Range"):
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            facts["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._send(206 if asked else 200, data[begin:], facts, large=name.endswith(LARGE))

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, facts: dict[str, str], large: bool = False) -> None:
        self.send_response(status)
        for name, value in (facts | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if large and self.hub.cut_after is not None:
            body, self.hub.cut_after = body[: self.hub.cut_after], None
            self.close_connection = True
        if large and self.hub.hold_after is not None:
            self.wfile.write(body[: self.hub.hold_after])
            self.wfile.flush()
            body = body[self.hub.hold_after :]
            self.hub.released.wait(60)
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _sibling(name: str, data: bytes) -> dict[str, object]:
    facts: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
    if name.endswith(LARGE):
        facts["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return facts


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in hub.servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        for server, thread in zip(hub.servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
