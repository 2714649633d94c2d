"""Model files after accidents: headers, configs, tokenizers and GGUFs, changed from one seed. Whatever is in them, reading them ends in
the model or in an error of its own, soon and in little memory."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path

import pytest

from orchestrator.cli.inspect import router_refusal
from tests.inputs.mutate import Mutator
from tests.support.figures import figure
from tests.support.tiny_models import tiny_gguf, tiny_model, tiny_tokenizer
from workers.artifacts.convert import convert
from workers.artifacts.inspect import inspect_path
from workers.protocol.errors import ArtifactError, ConfigError, Rejected, TriremeError
from workers.protocol.specs import Parallel

SEED = 20261201
long = pytest.mark.long
#: Levels of brackets that no parser of ours may follow by recursion.
DEEP = 100_000
#: Bytes of a GGUF in which its header lies.
GGUF_HEAD = 6000


def originals(folder: Path) -> list[Path]:
    """A Hugging Face folder, a checkpoint of it, a GGUF of it."""
    tiny_model(folder / "hf")
    tiny_tokenizer(folder / "hf")
    convert(folder / "hf", folder / "checkpoint", parallel=Parallel(tp=2))
    tiny_gguf(folder / "hf", folder / "model.gguf")
    return [folder / "hf", folder / "checkpoint", folder / "model.gguf"]


def spoil_json(mutator: Mutator, data: bytes) -> bytes:
    """Bytes or values of it changed, or one place nested deeply."""
    pick = mutator.random
    if pick.random() < 0.4:
        return mutator.bytes(data)
    found = json.dumps(mutator.tree(json.loads(data))).encode()
    if pick.random() < 0.1:
        found = found.replace(b":", b":" + pick.choice((b"[", b'{"a":')) * DEEP, 1)
    return found


def spoil(mutator: Mutator, original: Path, copy: Path) -> Path:
    """A copy of the model with one file of it changed, weights in their headers alone."""
    pick = mutator.random
    if original.is_file():
        data = original.read_bytes()
        target = copy / original.name
        copy.mkdir()
        target.write_bytes(mutator.bytes(data[:GGUF_HEAD]) + data[GGUF_HEAD:])
        return target
    shutil.copytree(original, copy)
    file = pick.choice(sorted(path for path in copy.rglob("*") if path.suffix in (".json", ".safetensors")))
    data = file.read_bytes()
    if file.suffix == ".json":
        file.write_bytes(spoil_json(mutator, data))
        return copy
    end = 8 + int.from_bytes(data[:8], "little")
    if pick.random() < 0.3:
        file.write_bytes(mutator.bytes(data[:end]) + data[end:])
    else:
        head = spoil_json(mutator, data[8:end])
        file.write_bytes(len(head).to_bytes(8, "little") + head + data[end:])
    return copy


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=[long, pytest.mark.timeout(1200)])])
def test_mutated_models(count: int, tmp_path: Path) -> None:
    """As `trireme inspect` reads them: what the ranks would load, and what a router would."""
    mutator, models = Mutator(SEED), originals(tmp_path)
    assert all(inspect_path(model, Parallel(tp=2)).kind for model in models)
    before, slowest, refused = _peak_mb(), 0.0, 0
    for number in range(count):
        copy = tmp_path / "copy"
        target = spoil(mutator, mutator.random.choice(models), copy)
        start = time.process_time()
        try:
            found = inspect_path(target)
            refusal = router_refusal(found, tmp_path) if found.runs else None
            refused += refusal is not None or not found.runs
            assert refusal is None or isinstance(refusal, TriremeError)
        except (ArtifactError, ConfigError, Rejected):
            refused += 1
        except Exception as error:
            raise AssertionError(f"model {number} of seed {SEED}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.process_time() - start)
        shutil.rmtree(copy)
    assert count / 4 < refused < count, refused
    figure(f"{count} mutated models: slowest", slowest, 5.0, "s of CPU")
    figure(f"{count} mutated models: memory", _peak_mb() - before, 300.0, "MB")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
