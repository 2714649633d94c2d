"""The definition of sampling and of the end of a sequence, which every engine implements.

Owns the counter-based noise, the order in which sampling parameters apply, and a numpy sampler that is the oracle for the torch one. Must
never hold state: each function is pure, so a stream continues equally on every replica that gets its record (prompt, emitted, parameters).

Noise is defined over integers in [0, 2**32). In int64 (numpy, torch) every product wraps and only its low 32 bits are kept by a mask, which
is exact; every right shift sees a non-negative number. A GPU kernel uses uint32 directly. With all sums and products mod 2**32::

    mix(x):  x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16        (lowbias32, C. Wellons)

    a = mix(seed[0:32] ^ 0x9E3779B9)                    # once a sequence
    b = mix(seed[32:64] + a)
    k = mix(position + b);  j = mix(k ^ a)              # once a sequence and step
    bits(id) = mix(mix(id + k) ^ j)                     # once a candidate
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from workers.protocol.errors import Rejected
from workers.protocol.messages import SamplingParams

MASK32: Final = 0xFFFFFFFF
GOLDEN: Final = 0x9E3779B9
MIX_A: Final = 0x7FEB352D
MIX_B: Final = 0x846CA68B

#: Below this temperature, dividing float32 logits by it may give infinity: routers treat smaller values as greedy.
MIN_TEMPERATURE: Final = 1e-5
#: Maximum length of a request's lists, which every step processes, and the largest bias.
MAX_LISTED: Final = 1024
#: Ids of all bad words together.
MAX_BAD_IDS: Final = 8192
MAX_BIAS: Final = 1e4
_RANGES: Final = {
    "temperature": (0.0, 1e3),
    "top_k": (0, 2**31 - 1),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-1e3, 1e3),
    "frequency_penalty": (-1e3, 1e3),
    "repetition_penalty": (1e-3, 1e3),
    "min_tokens": (0, 2**31 - 1),
}

Floats = npt.NDArray[np.float32]
#: Largest float32 below 1: the cap that keeps ``log1p(-w)`` finite.
_BELOW_ONE: Final = np.float32(1.0 - 2.0**-24)


def choice_seed(seed: int, choice: int) -> int:
    """Seed of choice ``choice`` of a request with ``n`` > 1; 63 bits, so that it stays a non-negative int64."""
    return (seed + choice) % 2**63


def stop_set(params: SamplingParams, eos_ids: Iterable[int]) -> frozenset[int]:
    """Token ids that end a sequence: its own ``stop_ids``, and the model's end-of-sequence ids unless these are ignored."""
    return frozenset(params.stop_ids) if params.ignore_eos else frozenset(params.stop_ids).union(eos_ids)


def has_penalties(params: SamplingParams) -> bool:
    """Whether sampling needs the history of the sequence (prompt and output ids)."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def has_mask(params: SamplingParams) -> bool:
    """Whether each step of the sequence has a mask of allowed ids: for a grammar, or for rules about single ids."""
    return params.guide is not None or has_token_rules(params)


def has_token_rules(params: SamplingParams) -> bool:
    """Whether the request has rules about single ids (:mod:`workers.sampling.token_rules`)."""
    return params.allowed_token_ids is not None or bool(params.bad_words)


def check(params: SamplingParams, *, vocab_size: int, max_logprobs: int) -> None:
    """Raises Rejected for values that the arithmetic here, or a bounded step, cannot handle. Routers are stricter, but any decodable
    message may arrive, and it must not affect other requests."""
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(params, name) <= high:  # written like this so that NaN is refused too
            raise Rejected(f"{name} must be {low:g} to {high:g}", f"it is {getattr(params, name)}", param=name)
    if 0.0 < params.temperature < MIN_TEMPERATURE:
        raise Rejected(f"temperature must be 0 or at least {MIN_TEMPERATURE:g}", f"it is {params.temperature}", param="temperature")
    for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and not 0 <= count <= max_logprobs:
            raise Rejected(f"{name} must be 0 to {max_logprobs}", f"it is {count}", param=name)
    bias = params.logit_bias or {}
    if len(bias) > MAX_LISTED or not all(0 <= token < vocab_size and abs(value) <= MAX_BIAS for token, value in bias.items()):
        why = f"ids are 0 to {vocab_size - 1}, values -{MAX_BIAS:g} to {MAX_BIAS:g}"
        raise Rejected(f"logit_bias must be at most {MAX_LISTED} known ids and their values", why, param="logit_bias")
    if len(params.stop_ids) > MAX_LISTED:
        raise Rejected(f"{len(params.stop_ids)} stop ids are more than {MAX_LISTED}", param="stop_token_ids")
    allowed = params.allowed_token_ids
    if allowed is not None and (not allowed or min(allowed) < 0 or max(allowed) >= vocab_size or len(allowed) > vocab_size):
        raise Rejected(f"allowed_token_ids must be some of the ids 0 to {vocab_size - 1}", param="allowed_token_ids")
    words = params.bad_words
    if sum(map(len, words)) > MAX_BAD_IDS or not all(word and min(word) >= 0 and max(word) < vocab_size for word in words):
        raise Rejected(f"bad_words must be at most {MAX_BAD_IDS} known ids, none of them empty", param="bad_words")


def mix(x: int) -> int:
    """The 32-bit mixer on one Python integer in [0, 2**32)."""
    x ^= x >> 16
    x = (x * MIX_A) & MASK32
    x ^= x >> 15
    x = (x * MIX_B) & MASK32
    return x ^ (x >> 16)


def _mix_all(x: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    x = x ^ (x >> 16)
    x = (x * MIX_A) & MASK32
    x = x ^ (x >> 15)
    x = (x * MIX_B) & MASK32
    return x ^ (x >> 16)


def seed_keys(seed: int) -> tuple[int, int]:
    """The pair (a, b) of one sequence, each in [0, 2**32)."""
    a = mix((seed & MASK32) ^ GOLDEN)
    return a, mix(((seed >> 32) + a) & MASK32)


def noise_keys(seed: int, position: int) -> tuple[int, int]:
    """The pair (k, j) of one sequence at one step, each in [0, 2**32)."""
    a, b = seed_keys(seed)
    k = mix((position + b) & MASK32)
    return k, mix(k ^ a)


def noise_bits(seed: int, position: int, ids: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Uniform 32-bit noise of candidate ``ids`` [N] for the token at absolute ``position`` (prompt starts at 0). Returns [N]."""
    k, j = noise_keys(seed, position)
    inner = _mix_all((np.asarray(ids, dtype=np.int64) + k) & MASK32)
    return _mix_all(inner ^ j).astype(np.uint32)


def gumbel(bits: npt.NDArray[np.uint32]) -> Floats:
    """Standard Gumbel noise in float32: ``-log(-log1p(-w))``, w = float32(bits) * 2**-32 + 2**-33, at most 1 - 2**-24.

    ``w`` is the same bits everywhere (one rounding, an exact scaling, one sum); the two logarithms agree to an ulp. ``log1p`` keeps the
    upper tail precise, which decides the argmax: noise is in [-2.82, 22.9] and never infinite.
    """
    w = bits.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    noise: Floats = -np.log(-np.log1p(-np.minimum(w, _BELOW_ONE)))
    return noise


def _penalize(logits: Floats, params: SamplingParams, history: Sequence[int], prompt_len: int) -> None:
    """Apply penalties in place: repetition over prompt and output, then frequency and presence over the output alone."""
    ids = np.asarray(history, dtype=np.int64)
    if params.repetition_penalty != 1.0:
        seen = np.unique(ids)
        rate = np.float32(params.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / rate, logits[seen] * rate)
    output, counts = np.unique(ids[prompt_len:], return_counts=True)
    logits[output] -= np.float32(params.frequency_penalty) * counts.astype(np.float32) + np.float32(params.presence_penalty)


def allowed_ids(mask: bytes, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Unpack a guide's bitmask (bit ``i % 32`` of little-endian uint32 word ``i // 32``) to [vocab_size] booleans."""
    return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little", count=vocab_size).astype(np.bool_)


def _nucleus(logits: Floats, params: SamplingParams) -> Floats:
    """Logits outside top-k, then top-p, then min-p set to -inf. Ties with the last kept logit are kept too."""
    if 0 < params.top_k < logits.size:
        edge = np.partition(logits, -params.top_k)[-params.top_k]
        logits = np.where(logits >= edge, logits, np.float32(-np.inf))
    if params.top_p < 1.0:
        values, inverse, counts = np.unique(-logits, return_inverse=True, return_counts=True)
        mass = np.exp(-(values - values[0]).astype(np.float64)) * counts
        above = np.cumsum(mass) - mass  # probability (unnormalised) of all strictly better tokens
        logits = np.where((above < params.top_p * mass.sum())[inverse], logits, np.float32(-np.inf))
    if params.min_p > 0.0:
        logits = np.where(logits >= logits.max() + np.float32(np.log(params.min_p)), logits, np.float32(-np.inf))
    return logits


def choose(
    logits_row: npt.ArrayLike,
    params: SamplingParams,
    history: Sequence[int],
    prompt_len: int,
    position: int,
    *,
    stops: Iterable[int] = (),
    mask: bytes | None = None,
) -> int:
    """The reference sampler; all arithmetic in float32, probabilities summed in float64.

    Order: logit bias; repetition, frequency, presence penalties; ``stops`` forbidden until ``min_tokens`` are out; guide ``mask``;
    greedy argmax if temperature is 0; else divide by temperature, top-k, top-p (of what top-k left), min-p, add Gumbel noise, argmax.
    Ties go to the lowest id.

    Args:
        logits_row: [V] raw logits; -inf marks padding and is never chosen.
        history: prompt and output ids; read only when there are penalties (else it may be empty).
        position: absolute position that the new token takes = tokens already known; output starts at ``prompt_len``.
        stops: as from :func:`stop_set`.

    Returns:
        The token id, or -1 when a logit is NaN or +inf or no candidate is left.
    """
    logits: Floats = np.array(logits_row, dtype=np.float32)
    if np.isnan(logits).any() or np.isposinf(logits).any():
        return -1
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += np.float32(bias)
    if has_penalties(params):
        _penalize(logits, params, history, prompt_len)
    if position - prompt_len < params.min_tokens:
        logits[[token for token in stops if token < logits.size]] = -np.inf
    if mask is not None:
        logits[~allowed_ids(mask, logits.size)] = -np.inf
    if np.isneginf(logits).all():
        return -1
    if params.temperature == 0.0:
        return int(np.argmax(logits))
    kept = _nucleus(logits / np.float32(params.temperature), params)
    candidates = np.flatnonzero(kept > -np.inf)
    return int(candidates[np.argmax(kept[candidates] + gumbel(noise_bits(params.seed, position, candidates)))])
