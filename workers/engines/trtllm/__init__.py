"""TensorRT-LLM behind the Engine seam: engine shards through the C++ Executor, or Hugging Face weights through the LLM API.

``options`` what a deployment may say · ``model`` what can be served · ``choose`` which backend fits · ``engine``, ``rows`` credit, stops,
and continuation, the same for both · ``executor``, ``llmapi`` the backends · ``pulse`` followers' sign of life · ``engine_dir``, ``build``,
``preflight`` the offline side. What TensorRT-LLM offers is known from its published API only: no name is used here that
``tests/contracts/tensorrt_llm_api.json`` lacks.
"""
