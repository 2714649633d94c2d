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
from orchestrator.cli.model_options import PpSize, QuantFlag, TpSize, dtype_of, quant_name
from orchestrator.cli.option_structs import with_option_structs


class ReplicaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The model's replicas: layout, number formats, limits, engine; and the address of the HTTP API."""

    tp_size: TpSize = 1
    pp_size: PpSize = 1
    replicas: Annotated[int | None, typer.Option("--replicas", min=1, help="How many replicas.")] = None
    dtype: Annotated[str, typer.Option("--dtype", help="Number format to compute in: fp32 (default) or bf16.")] = ""
    quant: QuantFlag = ""
    served_model_name: Annotated[str, typer.Option("--served-model-name", help="What clients call it; else its own name.")] = ""
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", metavar="FILE", help="A Jinja template to use in place of the model's own.")
    ] = None
    max_seq_len: Annotated[int | None, typer.Option("--max-seq-len", "--max-model-len", help="Longest prompt and answer, tokens.")] = None
    max_batch_size: Annotated[int | None, typer.Option("--max-batch-size", "--max-num-seqs", help="Sequences in one step.")] = None
    max_num_tokens: Annotated[int | None, typer.Option("--max-num-tokens", "--max-num-batched-tokens", help="Tokens in one step.")] = None
    kv_tokens: Annotated[int | None, typer.Option("--kv-tokens", help="Size of the KV cache, tokens.")] = None
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of each rank.")] = None
    engine: Annotated[str | None, typer.Option("--engine", metavar="portable|fake|trtllm", help="What computes.")] = None
    host: Annotated[str | None, typer.Option("--host", help="HTTP address; beyond loopback it needs --api-keys-file.")] = None


@with_option_structs
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's name, a Hugging Face folder, a GGUF or a checkpoint.")],
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
    tree = {"models": [{"name": flags.pop("served_model_name") or label(model), "path": model}]}
    flags |= {"dtype": dtype_of(replicas.dtype), "quant": quant_name(replicas.quant)}
    host_or_detach(context.obj, deployment_file.load(tree, flags=flags, env=os.environ).config, detach)


def label(model: str) -> str:
    """The name of a model that was given as a path: the last part of the path, without `.gguf`."""
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.name or model
