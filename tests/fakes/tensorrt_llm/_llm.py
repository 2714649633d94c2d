"""The fake's LLM (PyTorch backend): outputs are cumulative, arguments are forbidden unless known, other ranks take tasks from a session."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

from tensorrt_llm import _modes, llmapi
from tensorrt_llm._brain import Brain, Item
from tensorrt_llm._contract import PYTHON, blank, checked, make_class

PATH = "tensorrt_llm.LLM"


class _Completion(llmapi.CompletionOutput):  # type: ignore[misc, valid-type, name-defined]
    @property
    def length(self) -> int:
        return len(self.__dict__["token_ids"])


class _Output(llmapi.RequestOutput):  # type: ignore[misc, valid-type, name-defined]
    """Async iterable; ``abort`` is in no published file, but the real one has it."""

    def __aiter__(self) -> Any:
        return self._steps()

    async def _steps(self) -> Any:
        while not self.__dict__["finished"]:
            tokens, final, error = await self._queue.get()
            if error:
                raise RuntimeError(error)
            self.__dict__["outputs"][0].__dict__["token_ids"].extend(tokens)
            self.__dict__["finished"] = final
            yield self

    def abort(self) -> None:
        self._brain.drop(self.__dict__["request_id"])


class LLM(make_class(PATH)):  # type: ignore[misc]
    def prepare(self) -> None:
        values = self.__dict__
        config = json.loads((Path(values["model"]) / "config.json").read_text())
        world = values["tensor_parallel_size"] * values["pipeline_parallel_size"]
        session = self._session = values["_mpi_session"]
        if world > 1 and session is None:
            raise RuntimeError("the fake spawns no workers")
        if session is not None:
            assert len(session.hello()) >= 1
        if _modes.MODES.get("raise") == "0":
            raise RuntimeError("the fake was ordered to raise here")
        cache = values["kv_cache_config"]
        size = cache.tokens_per_block
        self._brain = Brain(
            vocab_size=config["vocab_size"], blocks=int(_modes.number("blocks", (cache.max_tokens or 65536) // size)), block_size=size,
            max_batch=values["max_batch_size"],
        )  # fmt: skip
        self._measured = values["enable_iter_perf_stats"]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._brain.wait_for_work():
            if self._brain.iterations > _modes.number("after", 0):
                _modes.act("generate", 0)
            self._brain.iterate()

    def generate_async(self, *args: Any, **kwargs: Any) -> Any:
        values = checked(PATH, "generate_async", args, kwargs)
        params, loop, queue = values["sampling_params"], asyncio.get_running_loop(), asyncio.Queue()  # type: ignore[var-annotated]
        assert values["streaming"] and params.end_id is not None and params.pad_id is not None

        def out(tokens: list[int], logprobs: list[float], final: bool, error: str) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (tokens, final, error))

        item = Item(
            tokens=list(values["inputs"]), max_new=params.max_tokens, out=out, greedy=params.top_k == 1, seed=params.seed or 0,
            temperature=params.temperature or 1.0, min_new=params.min_tokens or 0, end_id=None if params.ignore_eos else params.end_id,
            stop_words=params.stop_token_ids or (), salt=values["cache_salt"] or "",
        )  # fmt: skip
        output = blank(_Output, outputs=[_Completion(index=0, token_ids=[])], finished=False, prompt_token_ids=list(values["inputs"]))
        output._queue, output._brain = queue, self._brain
        output._set(request_id=self._brain.add(item))
        return output

    def get_stats(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        timeout = checked(PATH, "get_stats", args, kwargs)["timeout"]
        deadline = time.monotonic() + timeout
        while self._measured and not self._brain.stats and time.monotonic() < deadline:
            time.sleep(0.005)
        return self._brain.take(self._brain.stats) if self._measured else []

    def get_kv_cache_events(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        checked(PATH, "get_kv_cache_events", args, kwargs)
        return [self._event(*event) for event in self._brain.take(self._brain.events)]

    def _event(self, number: int, kind: str, told: Any) -> dict[str, Any]:
        data: dict[str, Any] = {"type": kind}
        if kind == "stored":
            parent, theirs, tokens = told
            block = {"type": "stored_block", "block_hash": theirs, "tokens": tokens, "cache_level": 0, "priority": 35}
            data |= {"parent_hash": parent, "blocks": [block]}
        elif kind == "removed":
            data["block_hashes"] = told
        return {"event_id": number, "data": data, "window_size": 0}

    def shutdown(self) -> None:
        if _modes.MODES.get("shutdown") == "hang":
            threading.Event().wait()
        self._brain.close()
        self._thread.join()
        if self._session is not None:
            self._session.shutdown()


assert PYTHON[PATH]["methods"].keys() >= {"generate_async", "get_stats", "get_kv_cache_events", "shutdown"}
