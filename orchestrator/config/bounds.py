"""What every number and text of a deployment file may be.

Owns the table of bounds by path, which :func:`check` holds a file's tree against before anything is made of it, so that no other layer
meets a number that cannot be. Types, and rules between several settings, are the structs' own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from workers.protocol.errors import ConfigError

#: A day and a year, seconds: no wait is longer than the first, no request than the second.
_DAY, _YEAR = 86_400, 31_536_000
_PORT = (0, 65535)
_RANKS = (1, 4096)
#: Tokens and bytes that no machine holds.
_TOKENS, _BYTES = 1 << 31, 1 << 50
#: Longest text, longest name of a model (it is in every request, log line and label), and most entries of a list.
MAX_TEXT, MAX_MODEL_NAME, MAX_ENTRIES = 4096, 256, 1024
#: The least and the most of every number, by its path.
NUMBERS: dict[str, tuple[float, float]] = {
    "http.port": _PORT,
    "http.max_body_bytes": (1024, 1 << 30),
    "rpc.port": (1, 65535),
    "back.port": (1, 65535),
    "metrics.port": _PORT,
    "routers": (1, 64),
    "ray.num_cpus": (0, 1_000_000),
    "ray.num_gpus": (-1, 1_000_000),
    "admission.max_queue": (0, 1_000_000),
    "admission.queue_timeout_s": (0, _YEAR),
    "admission.request_timeout_s": (0, _YEAR),
    "admission.max_n": (1, 1024),
    "admission.replica_limit": (1, 1_000_000),
    "admission.max_requests": (1, 1_000_000),
    "admission.max_bytes": (1024, 1 << 40),
    "admission.max_queued_tokens": (1, _TOKENS),
    "admission.tenant_share": (0.001, 1),
    "heartbeat_s": (0.01, 3600),
    "replica_timeout_s": (0.02, _DAY),
    "hang_floor_s": (0.1, _DAY),
    "start_timeout_s": (0.1, _DAY),
    "drain_grace_s": (0, _DAY),
    "tracing.sample": (0, 1),
    "models[].replicas": (1, 256),
    "models[].replicas[].tp_size": (0, 4096),
    "models[].replicas[].pp_size": (0, 4096),
    "models[].tp_size": _RANKS,
    "models[].pp_size": _RANKS,
    "models[].cpus_per_rank": (0, 4096),
    "models[].threads": (1, 4096),
    "models[].max_batch_size": (1, 4096),
    "models[].max_num_tokens": (1, 1 << 24),
    "models[].max_seq_len": (0, _TOKENS),
    "models[].kv_tokens": (0, _TOKENS),
    "models[].kv_bytes": (0, _BYTES),
    "models[].block_size": (8, 128),
    "models[].gpu_memory_utilization": (0.01, 1),
    "models[].fake_step_ms": (0, 1000 * _DAY),
    "models[].fake_token_us": (0, 1000 * _DAY),
    "models[].trtllm.start_timeout_s": (0.1, _DAY),
    "models[].trtllm.poll_ms": (1, 1000),
    "models[].trtllm.llm_kv_cache.tokens_per_block": (1, 4096),
}
#: The other numbers of TensorRT-LLM, which it judges itself: they fit into 64 bits.
_TRTLLM = (-(1 << 63), (1 << 63) - 1)
_NAMES = re.compile(r"models\[\]\.(name|aliases\[\])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check(tree: Any, origin: Callable[[str], str]) -> None:
    """Raises ConfigError for the first value in ``tree`` (mappings, lists, scalars) that cannot be. ``origin``: where the value of a path
    came from."""
    for path, value in _values(tree, ""):
        plain = re.sub(r"\[\d+\]", "[]", path)
        if isinstance(value, str):
            most = MAX_MODEL_NAME if _NAMES.fullmatch(plain) else MAX_TEXT
            if len(value) > most:
                raise ConfigError(f"{path}: a text of {len(value)} characters", f"from {origin(path)}", f"it has at most {most}")
            if _CONTROL.search(value):
                raise ConfigError(f"{path}: {value!a} holds a control character", f"from {origin(path)}", "leave it out")
        elif isinstance(value, list | tuple):
            if len(value) > MAX_ENTRIES:
                raise ConfigError(f"{path}: a list of {len(value)} entries", f"from {origin(path)}", f"it has at most {MAX_ENTRIES}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            low, high = NUMBERS.get(plain, _TRTLLM if plain.startswith("models[].trtllm.") else (-math.inf, math.inf))
            if not low <= value <= high:
                raise ConfigError(f"{path}: {_shown(value)} is not possible", f"from {origin(path)}", f"it is {low} to {high}")


def _shown(value: float) -> str:
    """A number, however large."""
    return str(value) if not math.isfinite(value) or abs(value) < 1e15 else f"{'-' if value < 0 else ''}1e{len(str(abs(int(value)))) - 1}"


def _values(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every list and every scalar, with its path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _values(value, f"{path}.{key}" if path else str(key))
        return
    yield path, tree
    if isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _values(value, f"{path}[{index}]")
