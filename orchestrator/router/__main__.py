"""Entry of a router process: ``python -m orchestrator.router SPEC.json``.

Reads the spec and the key files that it names, sets up logging, runs :class:`~orchestrator.router.process.RouterProcess`, and turns an
error into lines and an exit code.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import uvloop

from orchestrator.auth.api_keys import parse_api_keys
from orchestrator.auth.curve_acl import parse_grants
from orchestrator.auth.keyring import read_salt
from orchestrator.config.router_spec import RouterSpec
from orchestrator.files import read_private
from orchestrator.router.frontend.text_models import load_texts
from orchestrator.router.http.connections import raise_descriptor_limit
from orchestrator.router.process import RouterProcess
from orchestrator.router.request_context import RequestContextFilter
from workers.logs import JsonLines, LogFormat
from workers.process import settle_heap
from workers.protocol.errors import ConfigError, TriremeError
from workers.serving.router_io import KeyPair

USAGE = "usage: python -m orchestrator.router SPEC.json"

_T = TypeVar("_T")


class _KeysFile(Generic[_T]):
    """A private file that is read again after each change."""

    def __init__(self, path: str, parse: Callable[[bytes], _T]) -> None:
        self._path, self._parse = Path(path), parse
        self._stamp: tuple[int, int, int] | None = None
        self._last_warning = ""

    def load(self) -> _T | None:
        """The new table; None while the file is unchanged. While the file is broken or missing, the last table stays in force."""
        try:
            stamp = self._identity()
            if stamp is not None and stamp == self._stamp:
                return None
            table = self._parse(read_private(self._path))
        except ConfigError as error:
            if self._stamp is None:
                raise
            if str(error) != self._last_warning:
                self._last_warning = str(error)
                logging.getLogger("trireme.router").warning("%s was not taken over: %s", self._path, error)
            return None
        self._stamp, self._last_warning = stamp, ""
        return table

    def _identity(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None  # the error of reading it says why
        return status.st_mtime_ns, status.st_ino, status.st_mode


def _none() -> None:
    """No allowed-keys file: the list stays empty."""


def read_spec(path: Path) -> RouterSpec:
    """Raises ConfigError on a file that is missing or is no router spec."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=RouterSpec)
    except OSError as error:
        raise ConfigError(f"cannot read {path}", error.strerror or "") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not a router spec", str(error)) from None


def read_keys(path: str) -> KeyPair | None:
    if not path:
        return None
    try:
        return msgspec.json.decode(read_private(Path(path)), type=KeyPair)
    except msgspec.DecodeError:
        raise ConfigError(f"{path} holds no CURVE key pair") from None


def set_up_logging(form: LogFormat) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(RequestContextFilter())
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def run(spec: RouterSpec) -> None:
    """Run a router until a signal stops it. Raises every :class:`TriremeError` that prevents it from serving."""
    raise_descriptor_limit()
    api_keys_file = spec.http.api_keys_file if spec.http is not None else ""
    process = RouterProcess(
        spec,
        load_texts(spec.models),
        salt_key=read_salt(Path(spec.salt_file)) if spec.salt_file else secrets.token_bytes(32),
        keys=read_keys(spec.key_file),
        load_grants=_KeysFile(spec.allowed_file, parse_grants).load if spec.allowed_file else _none,
        load_api_keys=_KeysFile(api_keys_file, parse_api_keys).load if api_keys_file else None,
    )
    # Each text is encoded alone, on a thread of ours. The tokenizer library would pass even one text to its own threads, which costs a
    # third more.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settle_heap()
    uvloop.run(process.run())


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        spec = read_spec(Path(arguments[0]))
        set_up_logging(spec.log_format)
        run(spec)
    except TriremeError as error:
        print(error.lines(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
