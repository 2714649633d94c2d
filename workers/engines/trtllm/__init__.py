"""TensorRT-LLM behind the Engine seam: engine shards through the C++ Executor, or Hugging Face weights through the LLM API.

``model`` what can be served · ``backend_choice`` which backend fits · ``engine``, ``sequence`` credit, stops and continuation, the same for
both · ``executor``, ``llmapi`` the backends · ``rank_liveness`` whether followers run · ``engine_dir``, ``build``, ``engine_catalogue``,
``preflight`` the offline side. What TensorRT-LLM offers is known from its published API only: no name is used here that
``tests/contracts/tensorrt_llm_api.json`` lacks.
"""
