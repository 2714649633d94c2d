"""Log lines, as text or as JSON objects, for routers and ranks.

Owns the two formats. Never decides what is logged, nor where.
"""

from __future__ import annotations

import logging
import time
from typing import Literal

import msgspec

LogFormat = Literal["text", "json"]
#: Optional fields of a line in addition to its message, in this order.
MARKS = ("replica", "rank", "request_id", "trace_id")


def stamp(seconds: float) -> str:
    """A time (Unix seconds) as the text form of a log line begins with it: ``2026-11-22 10:00:00,123``, local time."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))},{int(seconds * 1000) % 1000:03d}"


class JsonLines(logging.Formatter):
    """One JSON object per line; a line break in a message cannot forge another line. ``marks``: fields of every line."""

    def __init__(self, **marks: str | int) -> None:
        super().__init__()
        self._marks = marks

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, object] = {
            "time": round(record.created, 3), "level": record.levelname, "logger": record.name, "message": record.getMessage(),
        }  # fmt: skip
        row |= self._marks
        row |= {mark: found for mark in MARKS if (found := getattr(record, mark, None)) is not None}
        if record.exc_info:
            row["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(row).decode()
