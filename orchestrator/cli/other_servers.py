"""Flags and commands that users know from vLLM, trtllm-serve, Ollama and kubectl, and what to write here instead. Owns only texts.

A flag with the same meaning here is a second spelling of our flag and is declared with it; this module has those with another meaning, or
with none.
"""

from __future__ import annotations

_AUTOMATIC = "it is always on, so leave it out"
_NO_SUCH = "there is no such thing here, so leave it out"
_TRTLLM = "in a deployment file, under trtllm: (docs/tensorrt-llm.md); then trireme up FILE"
_REQUEST = "say it in each request (docs/api.md)"
_TLS = "name cert and key in http.tls of a deployment file (docs/security.md)"
_LOGS = "trireme --debug, or --log-format json; trireme logs -f shows them"
_KEY = "everybody on this host sees a command line: trireme keys api add NAME makes a key, --api-keys-file FILE opens the HTTP API with it"
_CODE = "no code of a model's folder is ever run; models that need it are not supported"

#: Flag (long form) -> our flag with the same meaning. Flags of layouts and limits are declared as second names of ours, and `--help` shows
#: them.
SPELLINGS = {
    "--data-parallel-size": "--replicas",
    "--download-dir": "--cache-dir",
    "--enable-prefix-caching": "--prefix-cache=true",
    "--kv-cache-memory-bytes": "--kv-bytes",
    "--no-enable-prefix-caching": "--prefix-cache=false",
    "--quantization": "--quant",
}
#: Flag (long form) -> what to do instead.
FLAGS = {
    "--allow-credentials": "keys are sent as Authorization, never as cookies; --allowed-origins says which pages may ask",
    "--api-key": _KEY,
    "--async-scheduling": _AUTOMATIC,
    "--backend": "use --engine portable or trtllm",
    "--calculate-kv-scales": "FP8 keys and values come with a checkpoint: trireme convert (docs/quantization.md)",
    "--cluster-size": "use -tp, -pp and --replicas",
    "--code-revision": _CODE,
    "--compilation-config": _AUTOMATIC,
    "--config": "trireme up FILE takes a deployment file",
    "--cpu-offload-gb": "weights stay on their device: use more GPUs (-tp), or --quant int8",
    "--custom-tokenizer": "use --tokenizer FOLDER",
    "--disable-custom-all-reduce": "it is chosen by what the GPUs can do, so leave it out",
    "--disable-log-requests": "requests are not logged, so leave it out",
    "--disable-log-stats": "trireme top and /metrics show them; nothing is logged",
    "--distributed-executor-backend": "use --launcher ray or local",
    "--enable-auto-tool-choice": "tools are called wherever a request has some, so leave it out",
    "--enable-chunked-prefill": _AUTOMATIC,
    "--enable-lora": "adapters are not served yet",
    "--enforce-eager": "graphs are captured at the start and cannot be turned off",
    "--ep-size": "use --expert-parallel: experts are distributed to the ranks of -tp",
    "--extra-llm-api-options": _TRTLLM,
    "--free-gpu-memory-fraction": "use --gpu-memory-utilization; for the engine trtllm: trtllm.kv_cache.free_gpu_memory_fraction",
    "--gpus-per-node": "CUDA_VISIBLE_DEVICES says which GPUs are used; under Ray its nodes do",
    "--hf-overrides": "a model runs as its config.json says",
    "--hf-token": "HF_TOKEN in the environment; everybody on this host sees a command line",
    "--kv-cache-dtype": "FP8 keys and values come with a checkpoint: trireme convert (docs/quantization.md)",
    "--kv-cache-free-gpu-memory-fraction": "use --gpu-memory-utilization; for the engine trtllm: trtllm.kv_cache.free_gpu_memory_fraction",
    "--limit-mm-per-prompt": "only text is served",
    "--log-level": _LOGS,
    "--lora-modules": "adapters are not served yet",
    "--max-beam-width": "beam search is not offered",
    "--max-log-len": "requests are not logged, so leave it out",
    "--max-logprobs": _REQUEST,
    "--max-lora-rank": "adapters are not served yet",
    "--max-seq-len-to-capture": _AUTOMATIC,
    "--model": "the model is the first word: trireme serve MODEL",
    "--moe-expert-parallel-size": "use --expert-parallel; for the engine trtllm: trtllm.moe_expert_parallel_size",
    "--num-gpu-blocks-override": "use --kv-tokens",
    "--num-postprocess-workers": "use --routers",
    "--num-scheduler-steps": _AUTOMATIC,
    "--rope-scaling": "a model runs as its config.json says",
    "--root-path": "put a proxy that takes the prefix away in front",
    "--scheduling-policy": "a deployment file's admission says who is served first (docs/routers.md)",
    "--seed": _REQUEST,
    "--skip-tokenizer-init": "routers turn text into ids, so a tokenizer is always needed",
    "--speculative-config": "drafts are not offered yet",
    "--ssl-certfile": _TLS,
    "--ssl-keyfile": _TLS,
    "--swap-space": "a sequence that loses its place is computed again; nothing is swapped",
    "--task": _NO_SUCH,
    "--tokenizer-mode": _NO_SUCH,
    "--tokenizer-revision": "give the folder of that revision with --tokenizer",
    "--tool-call-parser": "it is chosen by the model's template, so leave it out",
    "--trust-remote-code": _CODE,
    "--uvicorn-log-level": _LOGS,
    "--worker-use-ray": "use --launcher ray",
}

#: Command -> what to do instead.
COMMANDS = {
    "get": "trireme status",
    "kill": "trireme down",
    "launch": "trireme serve MODEL, or trireme up FILE",
    "list": "trireme status shows what runs; trireme engines what was built",
    "ls": "trireme status shows what runs; trireme engines what was built",
    "models": "trireme status",
    "ps": "trireme status",
    "restart": "trireme drain REPLICA replaces one; trireme update FILE all of them",
    "rm": "trireme down ends a deployment; models lie in ~/.cache/trireme",
    "run": "trireme serve MODEL, then trireme chat",
    "scale": "change replicas in the file, then trireme update FILE",
    "show": "trireme inspect MODEL",
    "start": "trireme serve MODEL, or trireme up FILE",
    "stop": "trireme down",
}
