"""``python -m workers``: one rank of a replica, under ``mpiexec -n <tp * pp>``.

Owns the process's beginning and end: arguments, files, environment, agreement of the ranks, log, exit code. Only rank 0 reads arguments and
files; the other ranks get the spec over MPI. Must never import torch or numpy before the spec has set the number of threads.
"""

from __future__ import annotations

import argparse
import difflib
import faulthandler
import logging
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args

import msgspec

from workers import process, rank
from workers.distributed.agreement import agree, broadcast, gather
from workers.engines.trtllm.environment import for_rank
from workers.epoch import make_epoch
from workers.protocol.engine import Engine, Follower
from workers.protocol.errors import ConfigError, EngineFault, EnvironmentFault, ErrorReport, TriremeError
from workers.protocol.specs import CommonEngineSpec, FakeOptions, PortableOptions, ReplicaSpec, TrtllmSpec
from workers.serving.router_io import KeyPair, check_address
from workers.serving.state_file import StateFile, read_state

#: Longest that a rank waits for the others at MPI's end, seconds.
FINALIZE_S = 5
#: NVLink multicast stays off: a program that dies while it uses multicast can make a host's GPUs unusable. With workspaces of a fixed size,
#: products are the same in every launch.
GPU_ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
#: Seconds between a rank's last output and the end of its world: mpiexec drops output that it has not read by then.
TOLD_S = 0.3
#: Additional time after the engine's own bound of its start, seconds.
GRACE_S = 2.0
#: See :func:`start_mpi`.
MPI_MULTIPLE = "--mpi-multiple"

log = logging.getLogger("trireme.main")
#: Flags of one kind of engine. TensorRT-LLM's options are one flag, in JSON.
OPTIONS = {
    "portable": set(PortableOptions.__struct_fields__),
    "fake": set(FakeOptions.__struct_fields__),
    "trtllm": {"trtllm"},
}


class Briefing(msgspec.Struct, frozen=True, kw_only=True):
    """Rank 0's first message to the others: a spec, or the error. Neither: there is nothing to do (``--help``)."""

    spec: ReplicaSpec | None = None
    error: ErrorReport | None = None
    debug: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, hint="python -m workers --help")


def parse(argv: list[str]) -> Briefing:
    """Arguments to a briefing; ``--tp_size`` means ``--tp-size``. Raises :class:`ConfigError`; SystemExit after ``--help``."""
    parser = _Parser(
        prog="python -m workers", description="One replica: start it as mpiexec -n <tp * pp> python -m workers ...", allow_abbrev=False
    )
    parser.add_argument("--spec", metavar="FILE", help="a ReplicaSpec as JSON; then no flag but --debug")
    parser.add_argument("--model", dest="artifact", metavar="PATH", help="model folder: checkpoint, engine shards or Hugging Face")
    parser.add_argument("--served-model-name", dest="model", metavar="NAME", help="model name in requests (default: the folder's)")
    parser.add_argument("--engine", dest="kind", help="portable, fake or trtllm")
    parser.add_argument("--tp-size", dest="tp", help="ranks that share each layer")
    parser.add_argument("--pp-size", dest="pp", help="stages that share the layers")
    parser.add_argument("--expert-parallel", action="store_true", default=None, help="distribute whole experts to the ranks of a stage")
    parser.add_argument("--router", action="append", metavar="ENDPOINT[,KEY]", help="a router's back socket and its CURVE key; repeatable")
    for name in ("name", "tokenizer", "epoch", "run-dir", "key-file", "heartbeat-s", "hang-floor-s"):
        parser.add_argument(f"--{name}")
    for name in (*CommonEngineSpec.__struct_fields__, *(name for names in OPTIONS.values() for name in names)):
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=argparse.SUPPRESS)
    parser.add_argument(MPI_MULTIPLE, action="store_true", help="have MPI serve several threads of a rank, which a trtllm engine needs")
    parser.add_argument("--debug", action="store_true", help="verbose log, and stack traces with errors")
    given = {key: value for key, value in vars(parser.parse_args([_dashes(word) for word in argv])).items() if value is not None}
    debug = given.pop("debug")
    del given["mpi_multiple"]  # needed before this rank gets its spec
    if "spec" not in given:
        return Briefing(spec=_from_flags(given), debug=debug)
    if len(given) > 1:
        raise ConfigError("--spec comes alone", "the file says everything", "drop the other flags")
    return Briefing(spec=_from_file(given["spec"]), debug=debug)


def _dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _from_flags(given: dict[str, Any]) -> ReplicaSpec:
    kind = given.pop("kind", "portable")
    engine = {"kind": kind} | {name: given.pop(name) for name in CommonEngineSpec.__struct_fields__ if name in given}
    options = {}
    for owner, names in OPTIONS.items():
        for name in names & given.keys():
            if kind != owner:
                raise ConfigError(
                    f"--{name.replace('_', '-')} means nothing here", f"the engine is {kind}", f"leave it out, or --engine {owner}"
                )
            options[name] = given.pop(name)
    engine["options"] = _json(options["trtllm"], "--trtllm") if "trtllm" in options else options
    if "artifact" not in given and kind != "fake":
        raise ConfigError("no model is given", hint="--model PATH, or --engine fake")
    artifact = given.setdefault("artifact", "")
    given.setdefault("model", Path(artifact).name or "fake")
    given.setdefault("name", given["model"])
    given["parallel"] = {name: given.pop(name) for name in ("tp", "pp", "expert_parallel") if name in given}
    given["routers"] = [dict(zip(("endpoint", "server_key"), text.split(",", 1), strict=False)) for text in given.pop("router", [])]
    return _convert(given | {"engine": engine}, "the flags")


def _from_file(path: str) -> ReplicaSpec:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}", error.strerror or str(error)) from None
    return _convert(_json(data, path), path)


def _json(data: bytes | str, source: str) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{source} is not JSON", str(error)) from None


def _convert(data: Any, source: str) -> ReplicaSpec:
    try:
        spec = msgspec.convert(data, ReplicaSpec, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source} cannot be a replica's spec", str(error), _nearest(str(error))) from None
    if spec.epoch:
        return spec
    return msgspec.structs.replace(spec, epoch=make_epoch(_last_epoch(spec.run_dir)))


def _last_epoch(run_dir: str) -> int:
    """The epoch in the state file of an earlier process; 0 = no such file."""
    try:
        before = read_state(run_dir) if run_dir else None
    except EnvironmentFault:
        return 0  # this process replaces the file
    return before.epoch if before is not None else 0


def _nearest(complaint: str) -> str:
    """The field that may have been meant, if msgspec does not know a field; empty for any other error."""
    unknown = re.search(r"unknown field `(\w+)`", complaint)
    if unknown is None:
        return ""
    close = difflib.get_close_matches(unknown.group(1), sorted(_field_names(ReplicaSpec)), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""


def _field_names(struct: Any) -> set[str]:
    """The fields of a struct and of all structs inside it."""
    names = set()
    for field in msgspec.structs.fields(struct):
        names.add(field.name)
        for kind in (field.type, *get_args(field.type)):
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                names |= _field_names(kind)
    return names


def read_keys(path: str) -> KeyPair | None:
    """The key pair in ``path``; None without a path. Raises :class:`ConfigError`, which names the file and never its content."""
    if not path:
        return None
    try:
        if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
            raise ConfigError(f"{path} can be read by others", "it holds a secret key", f"chmod 600 {path}")
        return msgspec.json.decode(Path(path).read_bytes(), type=KeyPair)
    except OSError as error:
        raise ConfigError(f"cannot read {path}", error.strerror or str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not a key file", "it is JSON with the keys public and secret") from None


def start_mpi(argv: list[str]) -> Any:
    """The world's communicator. Raises :class:`EnvironmentFault` if MPI is missing.

    The portable engine makes every MPI call from one thread. TensorRT-LLM has its own threads that call MPI. At this point only rank 0
    knows which engine runs, so a command-line argument, which all ranks have, selects the thread level.
    """
    multiple = any(word in (MPI_MULTIPLE, "--engine=trtllm") for word in map(_dashes, argv)) or "trtllm" in argv
    try:
        import mpi4py

        mpi4py.rc.thread_level = "multiple" if multiple else "funneled"
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise EnvironmentFault("MPI is not available", why, "pip install 'trireme-llm[mpich]', or load the site's MPI and mpi4py") from None
    return MPI.COMM_WORLD


def world(argv: list[str]) -> tuple[Any, Briefing]:
    """The world's communicator, and the briefing. None = only this rank, which is enough for some replicas (`needs_mpi`) if no MPI is
    installed.

    Raises :class:`EnvironmentFault` if MPI is missing and needed.
    """
    try:
        comm = start_mpi(argv)
    except EnvironmentFault:
        told = brief(None, argv)
        if told.spec is not None and told.spec.needs_mpi:
            raise
        return None, told
    return comm, brief(comm, argv)


def brief(comm: Any, argv: list[str]) -> Briefing:
    """The briefing that rank 0 reads from ``argv``, on every rank."""
    told = Briefing()
    if comm is None or comm.Get_rank() == 0:
        try:
            told = parse(argv)
        except TriremeError as error:
            told = Briefing(error=ErrorReport.of(error))
        except SystemExit:  # --help
            told = Briefing()
    return msgspec.json.decode(broadcast(comm, msgspec.json.encode(told)), type=Briefing)


class Rank:
    """One rank from the agreed spec to its exit code."""

    def __init__(self, comm: Any, spec: ReplicaSpec, *, debug: bool) -> None:
        self._comm, self._spec, self._debug = comm, spec, debug
        self._rank: int = 0 if comm is None else comm.Get_rank()
        self._terminal = 2
        self._state = StateFile(spec.run_dir, name=spec.name, epoch=spec.epoch, pids=[])
        self._keys: KeyPair | None = None
        self._signals = rank.Signals(self._rank)

    def run(self) -> int:
        """The exit code. After an error that all ranks raise, each rank ends normally; after one that only this rank knows of, it aborts
        the world."""
        try:
            try:
                part = self._load()
            except TriremeError as error:
                self._report(error)
                return error.exit_code
            self._serve(part)
            return 0
        except SystemExit:
            log.info("ordered to stop at once")
            self._state.enter("stopped")
            self._abort(0)
        except Exception as error:
            known = error.error if isinstance(error, process.Alone) else error
            if not isinstance(known, TriremeError) or known is not error:
                log.exception("rank %d ends", self._rank)
            if isinstance(known, ImportError):  # another launch would fail in the same way
                hint = "install trireme-llm with what its engine needs into the Python of the ranks"
                known = ConfigError(f"rank {self._rank} cannot load the engine", f"{type(known).__name__}: {known}", hint)
            elif not isinstance(known, TriremeError):
                known = EngineFault(f"rank {self._rank} failed", f"{type(error).__name__}: {error}", "the rank's log has the stack trace")
            self._report(known, alone=True)
            time.sleep(TOLD_S)
            self._abort(known.exit_code)

    def _abort(self, code: int) -> NoReturn:
        """End all ranks at once."""
        if self._comm is None:
            os._exit(code)
        self._comm.Abort(code)
        raise AssertionError("MPI_Abort returned")

    def _load(self) -> Engine | Follower:
        """This rank's part of the engine. A TriremeError from here was raised on every rank."""
        spec, world = self._spec, self._spec.parallel.world if self._comm is None else self._comm.Get_size()
        failure: TriremeError | None = None
        try:
            level = logging.DEBUG if self._debug else logging.INFO
            self._terminal = process.open_log(spec.run_dir, self._rank, level, spec.log_format, spec.name)
        except TriremeError as error:
            failure = error
        if world != spec.parallel.world:
            raise EnvironmentFault(
                f"the layout needs {spec.parallel.world} ranks and the world has {world}",
                f"tp={spec.parallel.tp} x pp={spec.parallel.pp}",
                f"mpiexec -n {spec.parallel.world} python -m workers ...",
            )
        me = msgspec.json.encode((self._rank, socket.gethostname(), os.getpid()))
        pids = [msgspec.json.decode(data, type=tuple[int, str, int]) for data in gather(self._comm, me)]
        process.unlink_shared_memory()
        if self._rank == 0 and failure is None:
            failure = self._prepare(pids)
        agree(self._comm, failure)
        # A rank uses only its share of the cores, because spinning threads of several ranks would slow each other down.
        os.environ["OMP_NUM_THREADS"] = str(spec.engine.threads)
        os.environ["OMP_WAIT_POLICY"] = "passive"
        if isinstance(spec.engine, TrtllmSpec):
            for name in for_rank(os.environ):
                del os.environ[name]
            with self._deadline(spec.engine.options.start_timeout_s):
                return rank.build(spec, self._comm)
        if spec.engine.device == "cuda":
            os.environ.update(GPU_ENVIRONMENT)
        return rank.build(spec, self._comm)

    @contextmanager
    def _deadline(self, bound_s: float) -> Iterator[None]:
        """End this process if the block takes longer: a C++ constructor that waits for another rank cannot be interrupted.

        Rank 0 ends first, because it can write the error to the state file. The second timer runs in C, for code that holds the
        interpreter's lock all the time.
        """

        def expire() -> None:
            what = f"rank {self._rank} did not start within {bound_s:g} s"
            error = EngineFault(what, "it waits for another rank, or hangs", "see the ranks' logs, or raise trtllm.start_timeout_s")
            self._report(error, alone=True)
            os._exit(error.exit_code)

        clock = threading.Timer(bound_s + (GRACE_S if self._rank == 0 else 2 * GRACE_S), expire)
        clock.daemon = True
        clock.start()
        faulthandler.dump_traceback_later(bound_s + 3 * GRACE_S, exit=True)
        try:
            yield
        finally:
            clock.cancel()
            faulthandler.cancel_dump_traceback_later()

    def _prepare(self, pids: list[tuple[int, str, int]]) -> TriremeError | None:
        """Checks and writes of rank 0 before loading; returns the error instead of raising it, so that the ranks can agree on it."""
        spec = self._spec
        try:
            state = StateFile(spec.run_dir, name=spec.name, epoch=spec.epoch, pids=pids)
            state.enter("starting")
            self._state = state
            self._keys = read_keys(spec.key_file)
            for address in spec.routers:
                check_address(address, self._keys)
            state.enter("loading")
        except TriremeError as error:
            return error
        return None

    def _serve(self, part: Engine | Follower) -> None:
        process.settle_heap()
        if isinstance(part, Follower):
            part.run()
            return
        rank.lead(self._spec, part, keys=self._keys, state=self._state, terminal=self._terminal, signals=self._signals)
        self._state.enter("stopped")

    def _report(self, error: TriremeError, *, alone: bool = False) -> None:
        """Write the error to the log, on rank 0 also to the state file, and on one rank to the terminal: rank 0, or with ``alone`` the only
        rank that knows the error."""
        log.error("%s", error, exc_info=error if self._debug else None)
        if self._rank == 0:
            self._state.enter("failed", error=error)
        if self._rank == 0 or alone:
            process.tell(self._terminal, error.lines())


def main(argv: list[str]) -> int:
    try:
        process.die_with_parent()
        comm, told = world(argv)
    except TriremeError as error:
        print(error.lines(), file=sys.stderr)
        return error.exit_code
    code = 0
    if told.error is not None:
        code = told.error.exit_code
        if comm is None or comm.Get_rank() == 0:
            print(told.error.error().lines(), file=sys.stderr)
    elif told.spec is not None:
        code = Rank(comm, told.spec, debug=told.debug).run()
    if comm is None:
        return code
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(FINALIZE_S)  # MPI_Finalize is a collective: a rank that never reaches it must not block this one
    from mpi4py import MPI

    MPI.Finalize()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
