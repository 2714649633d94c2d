"""The fake's Executor: LEADER mode over the real MPI world, its ranks in step, errors in the words that users report."""

from __future__ import annotations

import json
import os
import threading
import time
from array import array
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

from tensorrt_llm import _modes
from tensorrt_llm._bindings import bindings
from tensorrt_llm._brain import Brain, Item
from tensorrt_llm._contract import PYTHON, blank, checked

PATH = "tensorrt_llm.bindings.executor.Executor"


class Ranks:
    """The world, and one all-reduce an iteration. Every call comes from one thread of its own, as in C++."""

    def __init__(self) -> None:
        from mpi4py import MPI

        assert MPI.Query_thread() == MPI.THREAD_MULTIPLE or MPI.COMM_WORLD.Get_size() == 1, "MPI was started for one thread"
        self._min = MPI.MIN
        self.comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()

    def meet(self, go: bool) -> bool:
        verdict, pause = array("i", [go]), 0.0001
        from mpi4py import MPI

        request = self.comm.Iallreduce(MPI.IN_PLACE, verdict, self._min)
        while not request.Test():
            time.sleep(pause)
            pause = min(2 * pause, 0.005)
        return bool(verdict[0])


def read_engine(path: Path, ranks: Ranks) -> dict[str, Any]:
    """The engine's configuration, or the error that a rank reports in real life."""
    import tensorrt_llm

    if strange := [name for name in os.environ if name.startswith("SLURM_") or name == "RAY_LOCAL_WORLD_SIZE"]:
        raise RuntimeError(f"the fake sees {', '.join(strange)}, which would tell it another world")
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    world = config["pretrained_config"]["mapping"]["world_size"]
    if world != ranks.size:
        raise RuntimeError(f"[TensorRT-LLM][ERROR] Assertion failed: mpiSize == tp * pp * cp ({ranks.size} vs {world})")
    if config["version"] != tensorrt_llm.__version__:
        raise RuntimeError("Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed. Version tag does not match.")
    content = (path / f"rank{ranks.rank}.engine").read_bytes()
    if b"other GPU" in content:
        raise RuntimeError("The engine plan file is generated on an incompatible device, expecting compute 9.0 got compute 8.0")
    if b"damaged" in content:
        raise RuntimeError("[TensorRT-LLM][ERROR] Failed to deserialize cuda engine.")
    return config


class Response(bindings.Response):  # type: ignore[misc, valid-type]
    def has_error(self) -> bool:
        return "_error" in self.__dict__

    @property
    def error_msg(self) -> str:
        return str(self.__dict__.get("_error", ""))

    @property
    def result(self) -> Any:
        if self.has_error():
            raise RuntimeError("a response with an error has no result")
        return self.__dict__["_result"]


class EventManager(bindings.kv_cache.KVCacheEventManager):  # type: ignore[misc]
    def get_latest_events(self, *args: Any, **kwargs: Any) -> list[Any]:
        values = checked("tensorrt_llm.bindings.executor.kv_cache.KVCacheEventManager", "get_latest_events", args, kwargs)
        assert isinstance(values["timeout_ms"], float | int | None)
        return [self._event(*event) for event in self.__dict__["_brain"].take(self.__dict__["_brain"].events)]

    def _event(self, number: int, kind: str, told: Any) -> Any:
        if kind == "stored":
            parent, theirs, tokens = told
            unique = [blank(bindings.kv_cache.UniqueToken, token_id=token, token_extra_id=0) for token in tokens]
            block = blank(bindings.kv_cache.KVCacheStoredBlockData, block_hash=theirs, tokens=unique, cache_level=0, priority=35)
            data = blank(bindings.kv_cache.KVCacheStoredData, parent_hash=parent, blocks=[block])
        elif kind == "removed":
            data = blank(bindings.kv_cache.KVCacheRemovedData, block_hashes=told)
        else:
            data = blank(bindings.kv_cache.KVCacheCreatedData, num_blocks_per_cache_level=told)
        return blank(bindings.kv_cache.KVCacheEvent, event_id=number, data=data, window_size=0)


class Executor(bindings.Executor):  # type: ignore[misc]
    def prepare(self) -> None:
        assert self.__dict__["model_type"] is bindings.ModelType.DECODER_ONLY
        self._ranks = ranks = Ranks()
        self._responses: deque[Any] = deque()
        _modes.act("construct", ranks.rank)
        if _modes.MODES.get("raise") == str(ranks.rank):
            raise RuntimeError("[TensorRT-LLM][ERROR] Assertion failed: the fake was ordered to raise here")
        engine = read_engine(Path(self.__dict__["model_path"]), ranks)
        _modes.act("load", ranks.rank)
        if _modes.MODES.get("oom") == str(ranks.rank):
            raise RuntimeError("CUDA runtime error in ::cudaMallocAsync(ptr, n, mMemPool->getPool(), mCudaStream->get()): out of memory")
        config, build = self.__dict__["executor_config"], engine["build_config"]
        self._longest = build["max_seq_len"] if config.enable_chunked_context else build["max_input_len"]
        size = build["plugin_config"]["tokens_per_block"]
        cache = config.kv_cache_config
        blocks = int(_modes.number("blocks", (cache.max_tokens or 65536) // size))
        vocab = engine["pretrained_config"]["vocab_size"]
        self._brain = Brain(vocab_size=vocab, blocks=blocks, block_size=size, max_batch=config.max_batch_size)
        self._manager = EventManager.__new__(EventManager)
        self._manager.__dict__["_brain"] = self._brain
        self._has_events = cache.event_buffer_max_size > 0
        ranks.meet(True)
        self._thread = threading.Thread(target=self._lead if ranks.rank == 0 else self._follow, daemon=True)
        self._thread.start()

    def _lead(self) -> None:
        while self._brain.wait_for_work():
            self._ranks.meet(True)
            self._misbehave()
            self._brain.iterate()
        self._ranks.meet(False)

    def _follow(self) -> None:
        while self._ranks.meet(True):
            self._brain.iterations += 1
            self._misbehave()

    def _misbehave(self) -> None:
        if self._brain.iterations > _modes.number("after", 0):
            _modes.act("generate", self._ranks.rank)

    def can_enqueue_requests(self) -> bool:
        return bool(self._ranks.rank == 0)

    def enqueue_request(self, *args: Any, **kwargs: Any) -> int:
        request = checked(PATH, "enqueue_request", args, kwargs)["request"]
        if self._ranks.rank:
            raise RuntimeError("only the leader can enqueue")
        sampling = request.sampling_config
        assert isinstance(request, bindings.Request) and request.streaming and request.output_config.exclude_input_from_output
        scores: list[float] = []
        handle = 0

        def out(tokens: list[int], logprobs: list[float], final: bool, error: str) -> None:
            scores.extend(logprobs)
            shown = None if not request.output_config.return_log_probs else scores if "cumulative" in _modes.MODES else logprobs
            self._respond(handle, request, tokens, shown, final, error)

        item = Item(
            tokens=list(request.input_token_ids), max_new=request.max_tokens, out=out, greedy=sampling.top_k == 1,
            seed=sampling.seed or 0, temperature=sampling.temperature or 1.0, min_new=sampling.min_tokens or 0, end_id=request.end_id,
            stop_words=[word[0] for word in request.stop_words or ()], salt=str(request.cache_salt_id or ""),
        )  # fmt: skip
        with self._brain.changed:
            handle = self._brain.add(item)
            if len(request.input_token_ids) > self._longest:
                self._brain.drop(handle)
                out([], [], True, f"Prompt length ({len(request.input_token_ids)}) exceeds maximum input length ({self._longest})")
        return handle

    def _respond(self, handle: int, request: Any, tokens: list[int], scores: list[float] | None, final: bool, error: str) -> None:
        found = Response.__new__(Response)
        found.__dict__.update(request_id=handle, client_id=request.client_id)
        if error:
            found._error = error
        else:
            found._result = blank(
                bindings.Result, output_token_ids=[tokens], is_final=final, is_sequence_final=final, sequence_index=0,
                log_probs=None if scores is None else [list(scores)],
            )  # fmt: skip
        self._responses.append(found)

    def cancel_request(self, *args: Any, **kwargs: Any) -> None:
        self._brain.drop(checked(PATH, "cancel_request", args, kwargs)["id"])

    def await_responses(self, *args: Any, **kwargs: Any) -> list[Any]:
        timeout = checked(PATH, "await_responses", args, kwargs)["timeout"]
        assert isinstance(timeout, timedelta), "timeout is a timedelta"
        with self._brain.changed:
            self._brain.changed.wait_for(lambda: self._responses, timeout.total_seconds())
            found = list(self._responses)
            self._responses.clear()
            return found

    def get_latest_iteration_stats(self) -> list[Any]:
        return [self._stats(entry) for entry in self._brain.take(self._brain.stats)]

    def _stats(self, entry: dict[str, Any]) -> Any:
        cache, batch = entry["kvCacheStats"], entry["inflightBatchingStats"]
        return blank(
            bindings.IterationStats,
            iter=entry["iter"],
            iter_latency_ms=entry["iterLatencyMS"],
            num_active_requests=entry["numActiveRequests"],
            num_queued_requests=entry["numQueuedRequests"],
            kv_cache_stats=blank(
                bindings.KvCacheStats,
                max_num_blocks=cache["maxNumBlocks"], free_num_blocks=cache["freeNumBlocks"], used_num_blocks=cache["usedNumBlocks"],
                tokens_per_block=cache["tokensPerBlock"], reused_blocks=cache["reusedBlocks"], missed_blocks=cache["missedBlocks"],
            ),
            inflight_batching_stats=blank(bindings.InflightBatchingStats, num_scheduled_requests=batch["numScheduledRequests"]),
        )  # fmt: skip

    def get_kv_cache_event_manager(self) -> Any:
        return self._manager if self._has_events else None

    def shutdown(self) -> None:
        if _modes.MODES.get("shutdown") == "hang":
            threading.Event().wait()
        if self._ranks.rank == 0:
            self._brain.close()
        self._thread.join()


assert PYTHON[PATH]["methods"].keys() >= {name for name in vars(Executor) if not name.startswith("_")} - {"prepare", "await_responses"}
