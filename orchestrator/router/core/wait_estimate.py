"""Estimates how long a choice would wait at a replica, from the replica's own reports. Pure functions."""

from __future__ import annotations


def expected_wait_ms(
    *,
    step_ms: float,
    occupancy: int,
    max_batch_size: int,
    step_tokens: int,
    queued_tokens: int,
    known_tokens: int,
    cached_tokens: int,
    choice_ms: float,
    output_tokens: float,
) -> float:
    """Time that a choice would lose at a replica before and while it is decoded, ms.

    The wait for its first token, and the share of a step by which ``occupancy`` neighbours slow each of its own about ``output_tokens``
    steps. The second part keeps a popular prefix from becoming a hot spot.
    """
    first = first_token_ms(
        step_ms=step_ms, occupancy=occupancy, max_batch_size=max_batch_size, step_tokens=step_tokens, queued_tokens=queued_tokens,
        new_tokens=known_tokens - cached_tokens, choice_ms=choice_ms,
    )  # fmt: skip
    return first + step_ms * output_tokens * min(occupancy, max_batch_size) / step_tokens


def first_token_ms(
    *, step_ms: float, occupancy: int, max_batch_size: int, step_tokens: int, queued_tokens: int, new_tokens: int, choice_ms: float
) -> float:
    """Time from a choice's arrival at a replica to its first token, ms.

    The prompt tokens before it and its own ``new_tokens`` go through steps that take ``step_tokens``, less one for each decoding choice.
    Choices beyond ``max_batch_size`` wait for others to end, one each ``choice_ms / max_batch_size``.
    """
    budget = max(1, step_tokens - min(occupancy, max_batch_size))
    prefill = (queued_tokens + max(1, new_tokens)) / budget
    return step_ms * prefill + max(0, occupancy + 1 - max_batch_size) * choice_ms / max_batch_size


def predicted_first_token_s(
    *, step_ms: float, occupancy: int, max_batch_size: int, step_tokens: int, queued_tokens: int, new_tokens: int, choice_ms: float
) -> float:
    """Time from a choice's arrival at a replica to its first token as a clock will measure it, seconds.

    :func:`first_token_ms` counts shares of steps; a clock measures whole ones: what is left of the running step, half of one on average,
    then at least one step with the choice in it.
    """
    wait_ms = first_token_ms(
        step_ms=step_ms, occupancy=occupancy, max_batch_size=max_batch_size, step_tokens=step_tokens, queued_tokens=queued_tokens,
        new_tokens=new_tokens, choice_ms=choice_ms,
    )  # fmt: skip
    return (max(wait_ms, step_ms) + (step_ms / 2 if occupancy else 0.0)) / 1000.0
