"""``tensorrt_llm.bindings`` of the fake."""
