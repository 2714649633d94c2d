"""A bare HTTP/1.1 client on asyncio streams: so cheap that hundreds of readers leave the cores to what is measured."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Streamed(NamedTuple):
    """``reads``: (when, bytes) of each read, seconds. Looked at when the clock has stopped."""

    status: int
    reads: list[tuple[float, bytes]]

    def gaps(self) -> list[float]:
        """Seconds between one token and the next as the reader had them; several in one read have none between them."""
        times = [when for when, data in self.reads for _ in range(data.count(b'"text":"'))]
        return [later - earlier for earlier, later in pairwise(times)]

    def text(self) -> str:
        """The whole answer; empty unless it ended as it should, without an error."""
        data = b"".join(piece for _, piece in self.reads)
        if self.status != 200 or b"data: [DONE]" not in data or b'"error":' in data:
            return ""
        chunks = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
        return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def _send(url: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int, dict[str, str]]:
    """Ask for a completion; returns when the head of the answer is there."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {address.netloc}\r\nconnection: close\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    return reader, writer, int(lines[0].split()[1]), headers


async def ask(url: str, body: dict[str, Any]) -> Answer:
    reader, writer, status, headers = await _send(url, body)
    try:
        return Answer(status, headers, await reader.read())
    finally:
        writer.close()


async def stream(url: str, body: dict[str, Any]) -> Streamed:
    """Read an SSE answer as it comes."""
    reader, writer, status, _ = await _send(url, body | {"stream": True})
    reads: list[tuple[float, bytes]] = []
    try:
        while piece := await reader.read(65536):
            reads.append((time.monotonic(), piece))
    finally:
        writer.close()
    return Streamed(status, reads)
