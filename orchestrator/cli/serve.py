"""`trireme serve`: a deployment of one model, described by flags."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from msgspec.structs import asdict

from orchestrator.cli.deployment_options import Detach, FrontendOptions, Launcher, LocationOptions
from orchestrator.cli.hosting import host_or_detach
from orchestrator.cli.model_options import ExpertParallel, PpSize, Revision, dtype_of, quant_name
from orchestrator.cli.option_structs import with_option_structs
from orchestrator.hub.reference import at_revision, parse


class ReplicaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The model's replicas: layout, number formats, limits, engine; and the address of the HTTP API."""

    tp_size: Annotated[
        int | None,
        typer.Option("--tp-size", "--tensor-parallel-size", min=1, help="Ranks that share each layer (-tp); by default as few as hold it."),
    ] = None
    pp_size: PpSize = 1
    expert_parallel: ExpertParallel = False
    replicas: Annotated[int | None, typer.Option("--replicas", min=1, help="How many replicas.")] = None
    device: Annotated[str | None, typer.Option("--device", metavar="auto|cpu|cuda", help="auto: GPUs if there are any.")] = None
    dtype: Annotated[str, typer.Option("--dtype", help="Number format to compute in: auto, bf16, fp16 or fp32.")] = ""
    quant: Annotated[str, typer.Option("--quant", help="Quantize weights to int8, int4 or fp8.")] = ""
    load_format: Annotated[str | None, typer.Option("--load-format", metavar="auto|dummy", help="dummy: random weights.")] = None
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="A folder with a tokenizer that replaces the model's own.")] = None
    served_model_name: Annotated[
        str, typer.Option("--served-model-name", help="Name of the model for clients; by default its own name.")
    ] = ""
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", metavar="FILE", help="A Jinja template to use in place of the model's own.")
    ] = None
    revision: Revision = ""
    max_seq_len: Annotated[int | None, typer.Option("--max-seq-len", "--max-model-len", help="Longest prompt and answer, tokens.")] = None
    max_batch_size: Annotated[int | None, typer.Option("--max-batch-size", "--max-num-seqs", help="Sequences in one step.")] = None
    max_num_tokens: Annotated[int | None, typer.Option("--max-num-tokens", "--max-num-batched-tokens", help="Tokens in one step.")] = None
    gpu_memory_utilization: Annotated[
        float | None, typer.Option("--gpu-memory-utilization", help="Share of a GPU's memory that may be in use; by default all but 2 GiB.")
    ] = None
    kv_tokens: Annotated[int | None, typer.Option("--kv-tokens", help="Size of the KV cache, tokens.")] = None
    kv_bytes: Annotated[int | None, typer.Option("--kv-bytes", help="Size of the KV cache of a rank, bytes.")] = None
    block_size: Annotated[int | None, typer.Option("--block-size", help="Tokens in a block of the KV cache.")] = None
    prefix_cache: Annotated[
        str | None, typer.Option("--prefix-cache", metavar="true|false", help="Reuse the cache of equal beginnings of prompts.")
    ] = None
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of each rank.")] = None
    engine: Annotated[str | None, typer.Option("--engine", metavar="portable|fake|trtllm", help="What computes.")] = None
    host: Annotated[str | None, typer.Option("--host", help="HTTP address; an address beyond loopback needs --api-keys-file.")] = None


@with_option_structs
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A name, a hub id, a Hugging Face folder, a GGUF or a checkpoint.")],
    *,
    replicas: ReplicaOptions,
    frontend: FrontendOptions,
    launcher: Launcher = None,
    location: LocationOptions,
    detach: Detach = False,
) -> None:
    """Serve one model: `trireme serve smollm2-135m-instruct -tp 2`."""
    from orchestrator.config import deployment_file

    flags = asdict(replicas) | asdict(frontend) | asdict(location) | {"launcher": launcher}
    tree = {"models": [{"name": flags.pop("served_model_name") or label(model), "path": at_revision(model, flags.pop("revision"))}]}
    flags |= {"dtype": "auto" if replicas.dtype == "auto" else dtype_of(replicas.dtype), "quant": quant_name(replicas.quant)}
    host_or_detach(context.obj, deployment_file.load(tree, flags=flags, env=os.environ).config, detach)


def label(model: str) -> str:
    """The name of a model: a hub id's ORG/NAME, or the last part of a path, without `.gguf`."""
    path = Path(model)
    if not path.exists() and (reference := parse(model)):
        return reference.repo
    path = Path(os.path.abspath(path)) if model else path  # `.` and `model/..` are folders with a name too; a link keeps its own
    return path.stem if path.suffix == ".gguf" else path.name or model
