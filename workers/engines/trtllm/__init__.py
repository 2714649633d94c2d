"""TensorRT-LLM behind the Engine protocol: engine shards through the C++ Executor, or Hugging Face weights through the LLM API.

``model`` what can be served · ``backend_choice`` which backend fits · ``engine``, ``sequence`` credit, stops and continuation, the same for
both · ``executor``, ``llmapi`` the backends · ``rank_liveness`` whether followers run · ``engine_dir``, ``build``, ``engine_catalogue``,
``preflight`` the offline side. TensorRT-LLM is known from its published API only: all names used here are in
``tests/contracts/tensorrt_llm_api.json``.
"""
