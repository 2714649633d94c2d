"""Names of spans and attributes: OpenTelemetry's conventions for generative AI, and Trireme's own names where there is no convention.

Owns the names only. The conventions are still in development; a change of a name is made here and nowhere else. There is no name for the
text of a prompt or an answer, and there must never be one.
"""

from __future__ import annotations

from typing import Final

OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_CHOICES: Final = "gen_ai.request.choice.count"
RESPONSE_ID: Final = "gen_ai.response.id"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
ERROR_TYPE: Final = "error.type"

CHAT: Final = "chat"
TEXT: Final = "text_completion"

#: Trireme's own.
PROVIDED_BY: Final = "trireme"
REQUEST_ID: Final = "trireme.request_id"
CHOICE: Final = "trireme.choice"
REPLICA: Final = "trireme.replica"
EPOCH: Final = "trireme.replica.epoch"
ATTEMPT: Final = "trireme.attempt"
DECISION: Final = "trireme.decision"
EXPECTED_WAIT: Final = "trireme.expected_wait_s"
EXPECTED_CACHED: Final = "trireme.expected_cached_tokens"
NEW_TOKENS: Final = "trireme.prompt_tokens_to_compute"
TOKENS: Final = "trireme.tokens"
CAUSE: Final = "trireme.cause"
FAILOVER: Final = "failover"
PREPARE: Final = "prepare"
QUEUE: Final = "queue"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
