"""`trireme verify`: compares an engine with the portable engine on the same checkpoint, prompt by prompt, token by token.

Owns the fixed prompts and the comparison. Both run as replicas of one deployment and get greedy requests, like those of any client. Where
two answers differ, the portable engine's own scores give the margin by which it preferred its token: rounding can explain only a small
margin.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from orchestrator.cli.console import Console, table
from orchestrator.cli.model_options import CacheDir, cache_folder
from workers.protocol.errors import ArtifactError, Rejected

if TYPE_CHECKING:
    from orchestrator.client import Client
    from orchestrator.client.results import Choice
    from workers.protocol.messages import Logprobs

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "The three primary colours are red,",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8, 13,",
    "In the beginning",
    "SELECT name, age FROM users WHERE",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "Q: What is the largest planet of the solar system?\nA:",
    "To make a cup of tea, first",
)
#: Alternatives whose scores are requested: an engine's token that is not among them has a much lower score.
ALTERNATIVES = 20
ENGINE, REFERENCE = "engine", "reference"
ANSWER_S = 1800.0
#: An engine is loaded and warmed up in minutes.
READY_S = 3600.0


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Two greedy answers to one prompt. ``same``: equal tokens before the first difference, of ``total``.

    At the first difference: the two tokens, and ``margin``: the reference's logprob of its own token minus that of the engine's token, in
    nats (a lower bound if ``open``: the engine's token is not among the alternatives).
    """

    prompt: str
    same: int
    total: int
    engine_token: int | None = None
    reference_token: int | None = None
    margin: float = 0.0
    open: bool = False

    @property
    def parted(self) -> bool:
        return self.same < self.total

    @property
    def shown(self) -> str:
        """The margin as text."""
        return f"{'>' if self.open else ''}{self.margin:.3f}" if self.parted else "-"


def compare(prompt: str, engine: Sequence[int], reference: Sequence[int], scores: Sequence[Logprobs]) -> Agreement:
    """Token by token. ``scores``: the reference's log-probabilities at each of its own positions, with alternatives."""
    total = min(len(engine), len(reference))
    same = next((at for at in range(total) if engine[at] != reference[at]), total)
    if same == total:
        # An answer that ends where the other continues differs there.
        longest = max(len(engine), len(reference))
        return Agreement(prompt=prompt, same=same, total=longest, margin=float("inf") if longest > total else 0.0)
    here = scores[same]
    best = here.logprob if here.logprob is not None else 0.0
    known = dict(zip(here.top_ids, here.top_logprobs, strict=True))
    other = known.get(engine[same])
    lowest = min(known.values(), default=best)
    margin = best - (lowest if other is None else other)
    return Agreement(
        prompt=prompt, same=same, total=total, engine_token=engine[same], reference_token=reference[same], margin=margin, open=other is None
    )  # fmt: skip


def verify(
    context: typer.Context,
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="The engine's name in the catalogue, or its folder.")],
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="The engine's checkpoint, if it was moved.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file of prompts, one per line, instead of the fixed ones.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Length of each answer.")] = 48,
    margin: Annotated[float, typer.Option("--margin", min=0.0, help="Largest margin that rounding may explain, nats.")] = 0.25,
    reference_device: Annotated[str, typer.Option("--reference-device", metavar="cpu|cuda", help="Device of the portable engine.")] = "cpu",
    form: Annotated[str, typer.Option("--output", "-o", metavar="text|json")] = "text",
    cache_dir: CacheDir = None,
) -> None:
    """Compare an engine with the portable engine on the same checkpoint and fixed prompts; exit code 3 if they disagree."""
    from workers.engines.trtllm import engine_catalogue
    from workers.engines.trtllm.engine_dir import read_engine_dir

    console: Console = context.obj
    if reference_device not in ("cpu", "cuda"):
        raise Rejected(f"--reference-device {reference_device} is not a device", hint="use cpu or cuda")
    found = read_engine_dir(engine_catalogue.find(cache_folder(cache_dir), engine))
    source = checkpoint or origin(found)
    asked = [line for line in prompts.read_text().splitlines() if line.strip()] if prompts is not None else list(PROMPTS)
    candidate = {
        "path": str(found.path.absolute()), "engine": "trtllm", "tp_size": found.parallel.tp, "pp_size": found.parallel.pp,
        "max_batch_size": min(64, found.max_batch_size), "max_num_tokens": found.max_num_tokens, "device": "cuda",
    }  # fmt: skip
    reference = {
        "path": str(source.absolute()), "engine": "portable", "dtype": "fp32", "device": reference_device,
        # Requests run one at a time, so the cache needs room for one.
        "max_seq_len": found.max_seq_len, "kv_tokens": found.max_seq_len + 64,
    }  # fmt: skip
    results = ask_both(console, candidate, reference, asked, tokens, cache_folder(cache_dir))
    report(console, results, margin, form)


def origin(engine: Any) -> Path:
    """The checkpoint that an engine was built from. Raises :class:`ArtifactError` if it is gone or has changed."""
    from workers.artifacts.checkpoint import MANIFEST
    from workers.artifacts.safetensors_file import hash_file

    if engine.record is None:
        raise ArtifactError(f"{engine.path} does not say what it was built from", "another program built it", "name it with --checkpoint")
    folder = Path(engine.record.checkpoint)
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(
            f"there is no checkpoint at {folder} any more", "the engine was built from it", "name another copy with --checkpoint"
        )
    if hash_file(folder / MANIFEST).sha256 != engine.record.checkpoint_sha256:
        why = "it has been written again since the engine was built"
        raise ArtifactError(f"{folder} is another checkpoint now", why, "build the engine again, or name a copy with --checkpoint")
    return folder


def ask_both(
    console: Console, candidate: dict[str, Any], reference: dict[str, Any], prompts: list[str], tokens: int, cache: Path
) -> list[Agreement]:
    """Serve both models on this machine and compare their answers to every prompt."""
    import yaml

    from orchestrator.cli.temporary_deployment import temporary_deployment
    from orchestrator.client import Client
    from orchestrator.config import deployment_file
    from orchestrator.control.host.control_socket import connect

    with tempfile.TemporaryDirectory(prefix="trireme-") as folder:
        models = [{"name": ENGINE, **candidate}, {"name": REFERENCE, **reference}]
        tree = {
            "name": "verify", "http": {"port": 0}, "launcher": "local", "run_dir": f"{folder}/run", "cache_dir": str(cache),
            "start_timeout_s": READY_S, "models": models,
        }  # fmt: skip
        file = Path(folder, "deployment.yaml")
        file.write_text(yaml.safe_dump(tree))
        config = deployment_file.load(file, env={}).config
        with temporary_deployment(console, config, file, ready_s=READY_S), Client(connect("verify", config.run_dir).status().rpc) as client:
            return [_ask(client, prompt, tokens) for prompt in prompts]


def _ask(client: Client, prompt: str, tokens: int) -> Agreement:
    def answer(model: str, logprobs: int | None) -> Choice:
        options: dict[str, Any] = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "logprobs": logprobs}
        given = {name: value for name, value in options.items() if value is not None}
        return client.complete(prompt, model=model, deadline_s=ANSWER_S, **given).result().choices[0]

    engine, reference = answer(ENGINE, None), answer(REFERENCE, ALTERNATIVES)
    return compare(prompt, engine.tokens, reference.tokens, reference.logprobs or [])


def report(console: Console, results: list[Agreement], margin: float, form: str) -> None:
    """Print the table and the result. Raises :class:`ArtifactError` if a margin is larger than rounding explains."""
    if form == "json":
        console.out(msgspec.json.format(msgspec.json.encode(results), indent=2).decode())
    else:
        rows = []
        for result in results:
            tokens = f"{result.engine_token} / {result.reference_token}" if result.engine_token is not None else "-"
            title = result.prompt.replace("\n", " ")[:40]
            rows.append([title, f"{result.same}/{result.total}", str(result.same) if result.parted else "-", tokens, result.shown])
        console.out(table(["PROMPT", "AGREE", "PARTS AT", "ENGINE / PORTABLE", "MARGIN"], rows))
    whole = sum(not result.parted for result in results)
    same, total = sum(result.same for result in results), sum(result.total for result in results)
    console.say(f"{whole} of {len(results)} answers are equal, {same} of {total} tokens before the first parting of each")
    if wrong := [result for result in results if result.parted and result.margin > margin]:
        worst = max(wrong, key=lambda result: result.margin)
        raise ArtifactError(
            f"the engine disagrees with the portable engine on {len(wrong)} of {len(results)} prompts",
            f"{worst.prompt[:40]!r} parts at token {worst.same} with a margin of {worst.shown} nats, above {margin:g}",
            "a quantized engine may need a larger --margin; else build it again, and report it",
        )
