"""Builds a tokenizer folder into the cache, once for each content of the files that it is built from.

transformers reads the other forms, in a process of its own: it takes seconds and hundreds of megabytes to import. Never runs code from a
folder, and asks no hub.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from workers.artifacts.atomic_folder import locked, replacing
from workers.artifacts.convert import Progress
from workers.artifacts.hf import tokenizer_paths
from workers.artifacts.safetensors_file import hash_file
from workers.protocol.errors import ArtifactError, EnvironmentFault

#: What tokenizers are built from, by the files that make one together.
FORMS = (
    ("tokenizer.model",), ("spiece.model",), ("sentencepiece.bpe.model",), ("tekken.json",), ("vocab.json", "merges.txt"),
    ("tiktoken.model",), ("qwen.tiktoken",),
)  # fmt: skip
#: Longer than any tokenizer takes, seconds.
_TIMEOUT_S = 600.0


def sources(folder: Path) -> list[Path]:
    """The files from which the tokenizer of ``folder`` can be built; none where it has ``tokenizer.json``, or no other form either."""
    if (folder / "tokenizer.json").is_file():
        return []
    whole = [form for form in FORMS if all((folder / name).is_file() for name in form)]
    return [folder / name for form in whole for name in form]


def build(folder: Path, cache: Path, progress: Progress) -> Path:
    """A folder with the ``tokenizer.json`` of ``folder`` and all else that belongs to its tokenizer.

    Raises:
        ArtifactError: transformers cannot read the tokenizer, or has no fast form of it.
        EnvironmentFault: transformers is not installed.
    """
    found = sources(folder)
    if find_spec("transformers") is None:
        names = ", ".join(path.name for path in found)
        hint = "pip install 'trireme-llm[convert]', or copy tokenizer.json beside the weights"
        raise EnvironmentFault(f"{folder} has no tokenizer.json", f"transformers makes it from {names}, and is not installed", hint)
    beside = [path for name, path in tokenizer_paths(folder).items() if (folder / name).is_file()]
    read = sorted({*found, *beside, *(path for path in [folder / "config.json"] if path.is_file())})
    digest = hashlib.sha256("".join(f"{path.name} {hash_file(path).sha256}\n" for path in read).encode()).hexdigest()
    target = cache / "tokenizers" / f"{folder.name}-{digest[:16]}"
    with locked(target.with_suffix(".lock"), on_wait=lambda: progress("wait for another process", 0, 0)):
        if not target.is_dir():
            progress("build tokenizer", 0, 0)
            with replacing(target) as aside:
                _run(folder, aside)
                for path in beside:
                    # transformers writes some of them again; those of the folder are what its maker gave.
                    place = aside / path.relative_to(folder)
                    place.parent.mkdir(exist_ok=True)
                    if path.name != "tokenizer_config.json":
                        shutil.copyfile(path, place)
    return target


def _run(folder: Path, target: Path) -> None:
    command = ["env", "HF_HUB_OFFLINE=1", "TRANSFORMERS_VERBOSITY=error", "TOKENIZERS_PARALLELISM=false"]
    command += [sys.executable, "-m", "orchestrator.tokenizer_build", str(folder), str(target)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ArtifactError(f"the tokenizer of {folder} cannot be built", f"it took more than {_TIMEOUT_S:g} s", _HINT) from None
    if done.returncode or not (target / "tokenizer.json").is_file():
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()] or [
            "its process ended and said nothing"
        ]
        raise ArtifactError(f"the tokenizer of {folder} cannot be built", lines[-1].strip()[:300], _HINT)


_HINT = "copy the model's tokenizer.json beside its weights"
