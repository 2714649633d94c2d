"""``tensorrt_llm.llmapi`` of the fake."""

from __future__ import annotations

from tensorrt_llm._contract import make

KvCacheConfig = make("tensorrt_llm.llmapi.llm_args.KvCacheConfig")
GuidedDecodingParams = make("tensorrt_llm.llmapi.GuidedDecodingParams")
RequestOutput = make("tensorrt_llm.llmapi.RequestOutput")
CompletionOutput = make("tensorrt_llm.llmapi.CompletionOutput")
