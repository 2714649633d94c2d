"""`trireme serve`: a deployment of one model, described by flags."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.deployment_options import (
    ApiKeysFile,
    CacheDir,
    Detach,
    Insecure,
    Launcher,
    Name,
    Port,
    Routers,
    RunDir,
)
from orchestrator.cli.hosting import host_or_detach
from orchestrator.cli.options import PpSize, QuantFlag, TpSize, dtype_of, quant_name


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's name, a Hugging Face folder, a GGUF or a checkpoint.")],
    tp_size: TpSize = 1,
    pp_size: PpSize = 1,
    replicas: Annotated[int | None, typer.Option("--replicas", min=1, help="How many gangs.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Number format to compute in: fp32 (default) or bf16.")] = "",
    quant: QuantFlag = "",
    served_model_name: Annotated[str, typer.Option("--served-model-name", help="What clients call it; else its own name.")] = "",
    max_seq_len: Annotated[int | None, typer.Option("--max-seq-len", "--max-model-len", help="Longest prompt and answer, tokens.")] = None,
    max_batch_size: Annotated[int | None, typer.Option("--max-batch-size", "--max-num-seqs", help="Rows in one step.")] = None,
    max_num_tokens: Annotated[int | None, typer.Option("--max-num-tokens", "--max-num-batched-tokens", help="Tokens in one step.")] = None,
    kv_tokens: Annotated[int | None, typer.Option("--kv-tokens", help="Size of the KV cache, tokens.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of each rank.")] = None,
    engine: Annotated[str | None, typer.Option("--engine", metavar="portable|fake|trtllm", help="What computes.")] = None,
    host: Annotated[str | None, typer.Option("--host", help="HTTP address; beyond loopback it needs --api-keys-file.")] = None,
    port: Port = None,
    api_keys_file: ApiKeysFile = None,
    insecure_http_without_keys: Insecure = None,
    routers: Routers = None,
    launcher: Launcher = None,
    name: Name = None,
    run_dir: RunDir = None,
    cache_dir: CacheDir = None,
    detach: Detach = False,
) -> None:
    """Serve one model: `trireme serve smollm2-135m-instruct -tp 2`."""
    from orchestrator.config import deployment_file

    flags = {
        "tp_size": tp_size, "pp_size": pp_size, "replicas": replicas, "dtype": dtype_of(dtype), "quant": quant_name(quant),
        "max_seq_len": max_seq_len, "max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "kv_tokens": kv_tokens,
        "threads": threads, "engine": engine, "host": host, "port": port, "api_keys_file": api_keys_file,
        "insecure_http_without_keys": insecure_http_without_keys,
        "routers": routers, "launcher": launcher, "name": name, "run_dir": run_dir, "cache_dir": cache_dir,
    }  # fmt: skip
    tree = {"models": [{"name": served_model_name or label(model), "path": model}]}
    host_or_detach(context.obj, deployment_file.load(tree, flags=flags, env=os.environ).config, detach)


def label(model: str) -> str:
    """The name of a model that was given as a path: the last part of the path, without `.gguf`."""
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.name or model
