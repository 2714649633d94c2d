"""The default model's shape on one CPU thread: fixed workloads with random weights, one JSON line each, for the planner's fit.

python -m bench.cpu_runs [--output FILE] [--repeats 2]

All requests are submitted at once to the real engine, prefix cache off. CPU seconds are measured, so other work on the machine has little
influence; the fastest repeat of each workload counts.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from bench.drive import submit
from bench.report import commit, facts, record
from orchestrator.planner.known_models import SHAPES
from workers.engines.portable import PortableEngine, build
from workers.protocol.specs import PortableOptions, PortableSpec, ReplicaSpec

SHAPE = "smollm2-135m-instruct"
#: name → requests, prompt and output tokens of each.
WORKLOADS = {"one": (1, 32, 24), "four": (4, 32, 24), "sixteen": (16, 64, 24), "prefill": (4, 256, 2)}


def write_shape(folder: Path) -> Path:
    """A Hugging Face folder without weights."""
    model = SHAPES[SHAPE]
    keys = {
        "model_type": model.architecture,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position,
        "rope_theta": model.ropes[0].theta,
        "rms_norm_eps": model.rms_norm_eps,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.widest_mlp,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "tie_word_embeddings": model.tied_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def started(folder: Path) -> PortableEngine:
    spec = PortableSpec(max_seq_len=1024, kv_tokens=16384, prefix_cache=False, options=PortableOptions(load_format="dummy"))
    engine = build(ReplicaSpec(name="bench", model=SHAPE, artifact=str(folder), engine=spec), None)
    assert isinstance(engine, PortableEngine)
    return engine


def cpu_seconds(engine: PortableEngine, requests: int, isl: int, osl: int) -> float:
    """The cost of serving all of them in this process."""
    draw = random.Random(requests)
    for index in range(requests):
        engine.submit(index, submit(index, [draw.randrange(engine.capacity.vocab_size) for _ in range(isl)], osl))
    begin = time.process_time()
    while engine.busy():
        engine.step()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, help="append JSON lines here")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    layout = {"engine": "trireme", "shape": SHAPE, "tp": 1, "pp": 1, "threads": 1, "dtype": "fp32", "max_num_tokens": 256, "clock": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        engine = started(write_shape(Path(folder)))
    cpu_seconds(engine, 4, 16, 4)
    for name, (requests, isl, osl) in WORKLOADS.items():
        seconds = min(cpu_seconds(engine, requests, isl, osl) for _ in range(args.repeats))
        sizes = {"workload": name, "requests": requests, "isl": isl, "osl": osl}
        speeds = {"seconds": round(seconds, 3), "output_tok_s": round(requests * osl / seconds, 1)}
        record(facts(commit()) | layout | sizes | speeds, args.output)
    engine.close()


if __name__ == "__main__":
    main()
