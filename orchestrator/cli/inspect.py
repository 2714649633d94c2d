"""`trireme inspect`: what a model file holds. `workers.artifacts.inspect` does the work."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from orchestrator.cli.console import Console, size
from orchestrator.cli.model_files import formats, locate_model
from orchestrator.cli.model_options import CacheDir, ExpertParallel, cache_folder
from workers.protocol.errors import ArtifactError, TriremeError
from workers.protocol.specs import MoeSpec, Parallel

if TYPE_CHECKING:
    from workers.artifacts.inspect import Inspection


def inspect(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's name, a Hugging Face folder, a GGUF or a checkpoint.")],
    tp_size: Annotated[
        int | None, typer.Option("--tp-size", "--tensor-parallel-size", min=1, help="Check whether it runs with this tp (-tp).")
    ] = None,
    pp_size: Annotated[
        int | None, typer.Option("--pp-size", "--pipeline-parallel-size", min=1, help="Check whether it runs with this pp (-pp).")
    ] = None,
    expert_parallel: ExpertParallel = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare every hash.")] = False,
    form: Annotated[str, typer.Option("--output", "-o", metavar="text|json")] = "text",
    cache_dir: CacheDir = None,
) -> None:
    """Show what a model file holds, and whether it can run on a layout; exit code 3 if it cannot."""
    from workers.artifacts.inspect import inspect_path

    console: Console = context.obj
    given = tp_size or pp_size or expert_parallel
    asked = Parallel(tp=tp_size or 1, pp=pp_size or 1, expert_parallel=expert_parallel) if given else None
    found = inspect_path(locate_model(model, console, cache_dir), asked, verify_files=verify)
    refusal = router_refusal(found, cache_folder(cache_dir)) if found.runs else None
    if refusal is not None:
        found = msgspec.structs.replace(found, runs=False, reason=f"{refusal.what}: {refusal.why}")
    if form == "json":
        console.out(json.dumps(msgspec.to_builtins(found, enc_hook=str), indent=2))
    else:
        rows = describe(found, asked, _tokenizer_words(found))
        if verify:
            rows.append(("verified", "every file" if found.verified else "every header: these files bring no hashes"))
        console.out("\n".join(f"{key:<14}{value}" for key, value in rows))
    if not found.runs:
        layout = asked or found.parallel or Parallel()
        hint = refusal.hint if refusal is not None else ""
        if refusal is None and found.parallel is not None and found.rank_bytes and found.parallel != layout:
            hint = f"trireme convert {model} -tp {layout.tp} -pp {layout.pp} -o DIR"
        raise ArtifactError(f"{model} does not run on {layout.words} as it is", found.reason, hint)


def router_refusal(found: Inspection, cache: Path) -> TriremeError | None:
    """Why no router could read prompts for the model: its tokenizer and its defaults of requests are loaded, and its chat template is
    compiled, as a router does it."""
    from orchestrator.model_store import tokenizer_folder
    from orchestrator.router.frontend.sampling_defaults import read_defaults
    from orchestrator.router.frontend.tokenizer import load
    from workers.artifacts.gguf import GgufFile
    from workers.artifacts.gguf_tokenizer import read_vocabulary, tokenizer_files

    try:
        if found.kind == "gguf":
            with tempfile.TemporaryDirectory(prefix="trireme-") as folder:
                for name, data in tokenizer_files(found.path, read_vocabulary(found.path, GgufFile(found.path).metadata)).items():
                    Path(folder, name).write_bytes(data)
                loaded = load(folder)
        else:
            loaded = load(str(tokenizer_folder(found.path, cache)))
            read_defaults(loaded.generation, str(found.path))
        if loaded.template is not None:
            loaded.template.compile()
    except TriremeError as error:
        return error
    return None


def _tokenizer_words(found: Inspection) -> str:
    from orchestrator.tokenizer_build.build import sources

    ends = f", ends on {', '.join(map(str, found.eos_ids))}" if found.eos_ids else ""
    if found.tokenizer:
        return f"yes{ends}"
    built = sources(found.path) if found.path.is_dir() else []
    return f"built from {', '.join(path.name for path in built)}{ends}" if built else "none"


def describe(found: Inspection, asked: Parallel | None, tokenizer: str) -> list[tuple[str, str]]:
    """The rows of `trireme inspect`. ``tokenizer``: what is said of it."""
    model, layout = found.model, asked or found.parallel or Parallel()
    heads = f"{model.num_heads} query / {model.num_kv_heads} key-value heads of {model.head_dim}"
    tied = ", tied embeddings" if model.tied_embeddings else ""
    active = f", {found.active_parameters:,} active for a token" if model.moes else ""
    rows = [
        ("path", str(found.path)),
        ("kind", found.kind if found.parallel is None else f"{found.kind} for {found.parallel.words}"),
        ("architecture", f"{model.architecture}, {model.num_layers} layers, hidden {model.hidden_size}, {heads}"),
        *(("experts", experts(moe)) for moe in model.moes),
        ("vocabulary", f"{model.vocab_size} tokens{tied}; context {model.max_position}"),
        ("weights", f"{found.parameters:,} parameters{active}, {formats(found)}"),
        ("tokenizer", tokenizer),
    ]
    if found.rank_bytes:
        rows.append((layout.words, "a rank: " + ", ".join(map(size, found.rank_bytes))))
    rows.append(("portable", "runs" if found.runs else found.reason))
    rows.append(("TensorRT-LLM", found.trtllm or ("layout accepted" if found.rank_bytes else found.reason)))
    return rows


def experts(moe: MoeSpec) -> str:
    """What a layer with experts has."""
    shared = f", and one of {moe.shared.size} for all tokens" if moe.shared is not None else ""
    return f"{moe.experts} of {moe.size} columns, {moe.experts_per_token} a token{shared}"
