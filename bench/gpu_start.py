"""Time until a replica is ready on a GPU: writes 16 GB of random weights as a checkpoint, reads it once, then starts a replica twice.

python -m bench.gpu_start [--folder DIR] [--shape 8b] [--output FILE]

The first start compiles every Triton kernel (its cache is empty), the second finds them. Times count from the start of the process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

from bench.gpu import Case, run, spec_of, write_shape
from bench.report import commit, facts, record, say
from workers.artifacts.artifact import open_artifact
from workers.artifacts.checkpoint import CONFIG, FORMAT, MANIFEST, Manifest, config_of, describe, rank_file
from workers.artifacts.number_formats import STORAGE
from workers.artifacts.safetensors_file import SafetensorsWriter, write_file
from workers.layout.quant_parts import stored_tensors
from workers.protocol.specs import Parallel, Quant


def write_checkpoint(folder: Path, shape: Path) -> int:
    """A tp=1 pp=1 bf16 checkpoint of ``shape`` with random weights; returns its bytes."""
    folder.mkdir(parents=True)
    model = open_artifact(shape, weights_optional=True).model
    facts, quant = describe(model, Parallel(), "bf16", ()), Quant()
    tensors = stored_tensors(model, Parallel(), 0, dtype="bf16", quant=quant)
    # bf16 of numbers around 1/50: random signs and mantissas over one exponent.
    some = np.random.default_rng(0).integers(0, 1 << 16, 1 << 26, dtype=np.uint16)
    some = (some & 0x80FF) | 0x3C00
    with SafetensorsWriter(folder / rank_file(0), {each.tensor.name: (each.tensor.shape, each.format) for each in tensors}, {}) as writer:
        for each in tensors:
            count = int(np.prod(each.tensor.shape))
            writer.write(each.tensor.name, np.resize(some, count).reshape(each.tensor.shape).astype(STORAGE["bf16"], copy=False))
        files = {rank_file(0): writer.finish()}
    config = config_of(facts, quant) | {"trireme": msgspec.to_builtins(facts)}
    files[CONFIG] = write_file(folder / CONFIG, json.dumps(config, indent=2).encode())
    write_file(folder / MANIFEST, msgspec.json.encode(Manifest(format=FORMAT, files=files)))
    return files[rank_file(0)].bytes


def read_once(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where 16 GB fit; a folder of its own is made there")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--output", type=Path, help="append JSON lines here")
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        begin = time.time()
        size = write_checkpoint(Path(folder, "checkpoint"), write_shape(Path(folder, "shape"), args.shape))
        read_once(Path(folder, "checkpoint", rank_file(0)))
        say(f"{size / 1e9:.1f} GB written and read in {time.time() - begin:.0f} s")
        shutil.rmtree(Path.home() / ".triton" / "cache", ignore_errors=True)
        spec = spec_of(Case(args.shape, Parallel()), Path(folder, "checkpoint"), load_format="auto")
        for kernels in ("compiled", "cached"):
            for line in run(spec, {"workloads": []}, 180):
                start = {"workload": "start", "kernels": kernels, "gb": round(size / 1e9, 1)}
                record(facts(args.commit) | line | start, args.output)


if __name__ == "__main__":
    main()
