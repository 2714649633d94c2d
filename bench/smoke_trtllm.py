"""`make smoke-trtllm`: the TensorRT-LLM backend on a host that really has it: convert, build, compare, serve, kill.

python -m bench.smoke_trtllm [--model NAME] [--output DIR]

Prints one line per check: PASS, FAIL with the reason, or SKIP with what is missing. Exit codes: 0 all passed, 1 a check failed, 4 this host
has no TensorRT-LLM, no GPU or no builder, and nothing was tested. The logs of all commands stay in DIR.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from orchestrator.cli.temporary_deployment import POLL_S, STOP_S, wait_ready
from orchestrator.client import Client
from orchestrator.config import deployment_file
from orchestrator.control.host.control_socket import ReplicaRow, connect
from orchestrator.model_store import DEFAULT_MODEL
from workers.engines.trtllm import build as building
from workers.engines.trtllm import node_probe
from workers.engines.trtllm.engine_dir import read_engine_dir
from workers.protocol.errors import EnvironmentFault, TriremeError
from workers.protocol.specs import Parallel

COMMAND = [sys.executable, "-m", "trireme"]
#: Layouts that the default model's 9 query and 3 key/value heads allow, smallest first.
LAYOUTS = (Parallel(), Parallel(pp=2), Parallel(tp=3), Parallel(tp=3, pp=2))
STEP_S = 3600.0
STREAMS, TOKENS = 8, 160


class Smoke:
    """The checks of one run and their results."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self.failed: list[str] = []

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Print one line: the block passed, or why not. The next check runs in both cases."""
        began = time.monotonic()
        try:
            yield
        except (TriremeError, AssertionError, subprocess.TimeoutExpired, OSError) as error:
            self.failed.append(name)
            print(f"FAIL  {name}: {error}", flush=True)
        else:
            print(f"PASS  {name} ({time.monotonic() - began:.1f} s)", flush=True)

    def run(self, name: str, *words: str) -> str:
        """A command's stdout; its whole output is logged. Raises AssertionError with the command's error if it fails."""
        log = self.folder / f"{name}.log"
        with log.open("w") as file:
            ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=file, text=True, timeout=STEP_S, check=False)
        said = log.read_text()
        log.write_text(f"$ {' '.join(words)}\n{said}\n{ran.stdout}")
        lines = [line for line in (said or ran.stdout).splitlines() if line.strip()] or ["it said nothing"]
        told = next((line for line in lines if line.startswith("error: ")), lines[-1])
        assert ran.returncode == 0, f"exit code {ran.returncode}: {told} (see {log})"
        return ran.stdout

    def trireme(self, name: str, *words: str) -> str:
        return self.run(name, *COMMAND, *words)


def host() -> node_probe.NodeFacts:
    """The facts of this host. Raises :class:`EnvironmentFault` if nothing can be tested."""
    path = os.environ.get("PATH", os.defpath)
    facts = node_probe.probe(path, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not facts.installed:
        what = "this host has no TensorRT-LLM, so nothing was tried"
        raise EnvironmentFault(
            what, "the distribution tensorrt_llm is not installed", "run this in the image of deploy/docker, on a GPU host"
        )
    if not facts.gpus:
        raise EnvironmentFault("this host has no GPU, so nothing was tried", "nvidia-smi shows none", "run this on a GPU host")
    building.find_program(path)
    return facts


def installed_interface(smoke: Smoke) -> None:
    """Compare the names that the backends use with the installed package, and the builder's options with its help."""
    with smoke.check("the installed package has every name that the backends use"):
        smoke.run("probe", sys.executable, "-m", "bench.probe_trtllm")
    with smoke.check("trtllm-build has every option that may be passed"):
        from workers.engines.trtllm.build_options import options

        told = smoke.run("trtllm-build-help", building.PROGRAM, "--help")
        lacking = [option.name for option in options() if f"--{option.name}" not in told]
        assert not lacking, f"it lacks --{', --'.join(lacking)}"


def engine(smoke: Smoke, layout: Parallel) -> tuple[Path, Path]:
    """(checkpoint, engine) of one layout, each made by its command."""
    name = f"tp{layout.tp}-pp{layout.pp}"
    checkpoint, target = smoke.folder / f"checkpoint-{name}", smoke.folder / f"engine-{name}"
    flags = ["--tp-size", str(layout.tp), "--pp-size", str(layout.pp), "--dtype", "bf16", "--for-trtllm"]
    with smoke.check(f"{name}: convert"):
        smoke.trireme(f"convert-{name}", "convert", smoke.model, "-o", str(checkpoint), *flags)
    limits = ["--max-batch-size", "32", "--max-num-tokens", "2048", "--max-seq-len", "1024"]
    with smoke.check(f"{name}: build"):
        smoke.trireme(f"build-{name}", "build", str(checkpoint), "-o", str(target), *limits)
    with smoke.check(f"{name}: a second build is found"):
        began = time.monotonic()
        smoke.trireme(f"rebuild-{name}", "build", str(checkpoint), "-o", str(target), *limits)
        record = read_engine_dir(target).record
        assert record is not None and time.monotonic() - began < max(30.0, record.seconds), "it was built again"
    with smoke.check(f"{name}: hashes, version and GPU"):
        smoke.trireme(f"engines-verify-{name}", "engines", "verify", str(target))
    with smoke.check(f"{name}: the same tokens as the portable engine, by the margin rule"):
        smoke.trireme(f"verify-{name}", "verify", str(target), "--checkpoint", str(checkpoint))
    return checkpoint, target


def serving(smoke: Smoke, layout: Parallel, checkpoint: Path, target: Path) -> None:
    """An engine replica and a portable one of the same model behind one router: streams, refusals, and the engine's ranks killed."""
    with tempfile.TemporaryDirectory(prefix="trireme-") as folder:
        replicas = [
            {"name": "engine", "engine": "trtllm", "path": str(target), "tp_size": layout.tp, "pp_size": layout.pp, "device": "cuda"},
            {"name": "portable", "engine": "portable", "path": str(checkpoint), "tp_size": layout.tp, "pp_size": layout.pp},
        ]
        model = {"name": "smoke", "path": str(checkpoint), "max_batch_size": 32, "max_num_tokens": 256, "max_seq_len": 1024}
        tree = {
            "name": "smoke", "http": {"port": 0}, "launcher": "local", "run_dir": f"{folder}/run", "start_timeout_s": STEP_S,
            "models": [{**model, "replicas": replicas}],
        }  # fmt: skip
        file = Path(folder, "smoke.yaml")
        file.write_text(yaml.safe_dump(tree))
        wanted = deployment_file.load(file, env={}).config
        with (smoke.folder / "up.log").open("w") as log:
            up = subprocess.Popen([*COMMAND, "up", str(file)], stdout=log, stderr=log)
        try:
            with smoke.check("up: an engine replica and a portable one, ready"):
                wait_ready(up, wanted, STEP_S)
            if up.poll() is None:
                ask(smoke, wanted)
        finally:
            up.send_signal(signal.SIGTERM)
            with smoke.check("down: everything ends by itself"):
                assert up.wait(STOP_S) == 0, f"trireme up exited with {up.returncode}"


def ask(smoke: Smoke, wanted: deployment_file.Config) -> None:
    control = connect(wanted.name, wanted.run_dir)

    def rows() -> dict[str, ReplicaRow]:
        return {row.name: row for model in control.status().models for row in model.replicas}

    def live() -> int:
        return sum(row.running + row.queue for row in rows().values())

    with Client(control.status().rpc, model="smoke") as client:
        with smoke.check("a prompt that is too long is refused"):
            call = client.complete([5] * 2000, max_tokens=8, deadline_s=60.0)
            try:
                call.result()
            except TriremeError as error:
                assert error.code == "context_length_exceeded", error
            else:
                raise AssertionError("it was answered")
        with smoke.check("a cancelled request is gone"):
            call = client.complete("Once upon a time", max_tokens=900, ignore_eos=True, deadline_s=60.0)
            next(call.stream())
            until(lambda: live() >= 1)
            call.cancel()
            until(lambda: live() == 0)
        before = rows()["engine"]
        with smoke.check(f"{STREAMS} streams go on where they were when the engine's last rank is killed"):
            calls = [
                client.complete(f"Chapter {number}.", seed=number, max_tokens=TOKENS, temperature=0.8, ignore_eos=True, deadline_s=600.0)
                for number in range(STREAMS)
            ]
            for call in calls:
                next(call.stream())
            os.kill(before.pids[-1][2], signal.SIGKILL)
            lengths = [len(call.result().tokens) for call in calls]
            assert lengths == [TOKENS] * STREAMS, f"answers of {lengths} tokens"
        with smoke.check("the engine replica comes back"):
            until(lambda: rows()["engine"].state == "READY" and rows()["engine"].epoch > before.epoch, STEP_S)


def until(condition: Callable[[], bool], bound_s: float = 60.0) -> None:
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {bound_s:g} s"
        time.sleep(POLL_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--output", type=Path, default=Path("build/smoke-trtllm"), help="checkpoints, engines and logs")
    args = parser.parse_args()
    try:
        facts = host()
    except EnvironmentFault as error:
        print(error.lines(), file=sys.stderr)
        return error.exit_code
    gpus = facts.gpus or ()
    print(f"tensorrt_llm {facts.installed}, {len(gpus)} x {gpus[0].name} (driver {gpus[0].driver})", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    smoke = Smoke(args.output.absolute(), args.model)
    installed_interface(smoke)
    made: list[tuple[Parallel, Path, Path]] = []
    for layout in LAYOUTS:
        if layout.world > len(gpus):
            print(f"SKIP  tp{layout.tp}-pp{layout.pp}: needs {layout.world} GPUs, there are {len(gpus)}")
            continue
        checkpoint, target = engine(smoke, layout)
        if (target / "config.json").is_file():
            made.append((layout, checkpoint, target))
    if made:
        serving(smoke, *made[-1])
    print(f"{len(smoke.failed)} checks failed; logs: {smoke.folder}")
    return 1 if smoke.failed else 0


if __name__ == "__main__":
    sys.exit(main())
