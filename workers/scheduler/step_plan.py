"""StepPlan and StepResult: the leader's decision as one value, and the result of the last pipeline stage.

A plan carries only differences. Every rank keeps, per *slot* (0 .. max_batch_size - 1), a sequence's block table and sampling state; a plan
opens slots, appends blocks to them, runs tokens through them and closes them. Columns are int32 little-endian bytes, viewed by numpy.

A rank applies a plan in this order: it drops the ``closed`` slots, creates the ``opened`` ones, appends the blocks, and runs the forward
pass.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from workers.protocol.messages import SamplingParams

I32: Final = np.dtype("<i4")
F32: Final = np.dtype("<f4")
Ints = npt.NDArray[np.int32]
#: In a plan, the placeholder for the token that an earlier plan in flight samples for the same slot: ranks have that token, the leader does
#: not yet.
PLACEHOLDER: Final = -1


def column(values: list[int] | Ints) -> bytes:
    """Pack integers as an int32 column."""
    return struct.pack(f"<{len(values)}i", *values) if isinstance(values, list) else values.astype(I32).tobytes()


def view(data: bytes) -> Ints:
    """Read-only int32 view of a column."""
    return np.frombuffer(data, dtype=I32)


def view_floats(data: bytes) -> npt.NDArray[np.float32]:
    return np.frombuffer(data, dtype=F32)


class OpenSlot(msgspec.Struct, frozen=True, array_like=True):
    """A sequence enters a slot. ``history``: column of prompt ids then emitted ids so far, sent only if sampling needs them (penalties or
    prompt logprobs), else empty. ``prompt_len``: where output starts, for output-only penalties."""

    slot: int
    params: SamplingParams
    prompt_len: int
    history: bytes = b""


class StepPlan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One forward over S sequences and T tokens.

    ``slots`` [S]; ``starts`` [S] = tokens of the sequence already in the KV cache (absolute position of its first query token); ``lengths``
    [S] = query tokens, sum T; ``tokens`` [T] ids (or ``PLACEHOLDER``), sequence after sequence; ``sample`` [S] = 1 where the last query
    position yields a token; ``block_slots`` / ``block_ids`` [B] = blocks appended this step, in order; ``closed`` [C] slots. ``masks``:
    (index of the sequence, packed vocabulary bitmask: bit i of uint32 word i // 32 = allowed) for guided sequences that sample. ``score``
    [S] (or empty = none): 1 if prompt logprobs of this chunk are requested. ``repeats``: the step that this one repeats, with the same
    sequences, all decodes, each one token further and from a placeholder; 0 = none. ``stop`` ends the rank's loop.
    """

    step: int
    repeats: int = 0
    slots: bytes = b""
    starts: bytes = b""
    lengths: bytes = b""
    tokens: bytes = b""
    sample: bytes = b""
    score: bytes = b""
    block_slots: bytes = b""
    block_ids: bytes = b""
    closed: bytes = b""
    opened: list[OpenSlot] = []
    masks: list[tuple[int, bytes]] = []
    stop: bool = False


class StepResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The last stage's result. ``tokens`` [N] int32 of the N sequences with ``sample`` = 1, in the plan's order; -1 = not finite logits.

    ``logprobs`` [N] float32 of the chosen tokens; ``top``: (index of the sequence, ids column, float32 column) if alternatives were
    requested; ``prompt_logprobs``: (index of the sequence, own-token logprobs float32 [L], top ids [L * k], top logprobs [L * k]) where
    ``score`` is 1. Entry i there is the prediction made AT query position i (so it scores the token at position i + 1).
    """

    step: int
    tokens: bytes = b""
    logprobs: bytes = b""
    top: list[tuple[int, bytes, bytes]] = []
    prompt_logprobs: list[tuple[int, bytes, bytes, bytes]] = []


_encoder = msgspec.msgpack.Encoder()
_plan_decoder = msgspec.msgpack.Decoder(StepPlan)
_result_decoder = msgspec.msgpack.Decoder(StepResult)


def encode(value: StepPlan | StepResult) -> bytes:
    return _encoder.encode(value)


def decode_plan(data: bytes | memoryview) -> StepPlan:
    return _plan_decoder.decode(data)


def decode_result(data: bytes | memoryview) -> StepResult:
    return _result_decoder.decode(data)
