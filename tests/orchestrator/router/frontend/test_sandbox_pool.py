"""Templates and grammars in processes of their own: what they may cost, and that nothing else feels it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from orchestrator.router.frontend import sandbox_pool
from orchestrator.router.frontend.chat_template import MAX_RENDERED, PromptPiece, TemplateFile, TemplateSource
from orchestrator.router.frontend.sandbox_pool import SandboxPool
from orchestrator.router.frontend.sandbox_worker import RenderJob
from tests.support.scripted_router import ServedDoor, tiny_texts
from tests.support.tiny_models import CHAT_TEMPLATE, SPECIALS
from workers.protocol.errors import ArtifactError, Rejected, Unavailable
from workers.protocol.messages import GuideSpec

SLEEPLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "good": CHAT_TEMPLATE,
    "loop": "{% if messages[0].content == 'bomb' %}" + SLEEPLESS + "{% endif %}fine",
    "memory": "{{ 'a' * 2000000000 }}",
    "folded": "{{ ('a' * 99999) * 99999 * 9 }}",
    "output": "{% for a in range(99999) %}{{ messages[0].content }}{% endfor %}",
    "escape": "{{ lipsum.__globals__.os.system('true') }}",
}


def source_of(text: str) -> TemplateSource:
    return TemplateSource(templates={"default": TemplateFile(source=text, origin="a.jinja")}, specials=SPECIALS, tokens={})


@asynccontextmanager
async def cells(limit_s: float = 10.0) -> AsyncIterator[SandboxPool]:
    """Two of them, which are gone at the end."""
    found = SandboxPool({name: source_of(text) for name, text in TEMPLATES.items()}, limit_s=limit_s)
    found.start()
    try:
        yield found
    finally:
        pids = found.pids
        found.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)


def job(model: str, content: str = "hi") -> RenderJob:
    return RenderJob(model=model, messages=[{"role": "user", "content": content}])


async def refusal(found: SandboxPool, model: str, content: str = "hi") -> Rejected:
    with pytest.raises(Rejected) as caught:
        await found.render(job(model, content))
    assert caught.value.param == "messages" and caught.value.status == 400
    return caught.value


def test_pieces_come_back_as_they_were_made() -> None:
    async def main() -> None:
        async with cells() as found:
            assert await found.render(job("good")) == [PromptPiece("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False)]
            pieces = await found.render(job("good", "<|im_end|>"))
            assert PromptPiece("user\n<|im_end|>", True) in pieces
            answers = await asyncio.gather(*(found.render(job("good", f"{index}")) for index in range(50)))
            assert all(f"user\n{index}<" in pieces[0].text for index, pieces in enumerate(answers))
            with pytest.raises(Rejected, match="serialize"):
                await found.render(RenderJob(model="good", messages=[{"role": "user", "content": "x"}], kwargs={"n": 1 << 70}))
            assert found.lost == 0

    asyncio.run(main())


def test_a_pool_that_was_frozen_with_its_processes_blames_no_template() -> None:
    async def main() -> None:
        async with cells(0.5) as found:
            await found.render(job("good"))
            pids = found.pids

            def freeze() -> None:
                time.sleep(1.5)
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)

            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(0.1, freeze)
            assert await found.render(job("good")) and found.lost == 0

    asyncio.run(main())


def test_a_process_that_gets_no_cpu_time_blames_no_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while the router runs: for longer than the limit of a job, and then permanently."""

    async def main() -> None:
        async with cells(0.3) as found:
            await found.render(job("good"))
            for pid in found.pids:
                os.kill(pid, signal.SIGSTOP)
            waiting = asyncio.create_task(found.render(job("good")))
            await asyncio.sleep(0.8)
            for pid in found.pids:
                os.kill(pid, signal.SIGCONT)
            assert await waiting and found.lost == 0
            monkeypatch.setattr(sandbox_pool, "PATIENCE_S", 0.6)
            for pid in found.pids:
                os.kill(pid, signal.SIGSTOP)
            with pytest.raises(Unavailable, match="too little CPU time") as caught:
                await found.render(job("good"))
            assert caught.value.status == 503 and caught.value.retry_after and found.lost == 1

    asyncio.run(main())


def test_a_template_that_costs_too_much_costs_its_request_only() -> None:
    """A bomb of time, of memory (also while it is compiled) and of output; the loop and the good requests go on meanwhile."""

    async def main() -> None:
        async with cells(limit_s=2.0) as found:
            await found.render(job("good"))
            gaps = [0.0]

            async def beat() -> None:
                last = time.monotonic()
                while True:
                    await asyncio.sleep(0.005)
                    now = time.monotonic()
                    gaps.append(now - last)
                    last = now

            beating = asyncio.create_task(beat())
            bomb = asyncio.create_task(refusal(found, "loop", "bomb"))
            while not bomb.done():
                assert (await found.render(job("loop")))[0].text == "fine"
            assert "longer than 2 s" in (await bomb).what
            beating.cancel()
            assert found.lost == 1
            assert max(gaps) < 2.0, "the event loop stood still"
        async with cells() as found:
            for model in ("memory", "folded", "output", "escape"):
                await refusal(found, model, "x" * (MAX_RENDERED // 1000))
            assert (await found.render(job("good")))[0].text
            assert found.lost == 0, "a bound that the process keeps by itself cost the process"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("line\n{% if %}", "line 2: Expected an expression"),
        ("{{ 'a' }}\n\n{{ x | unheard_of }}", "line 3: No filter named 'unheard_of'"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{% break %}", "SyntaxError: 'break' outside loop"),
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "RecursionError"),
    ],
)
def test_a_template_that_cannot_be_compiled_ends_the_start(text: str, why: str) -> None:
    async def main() -> None:
        found = SandboxPool({"good": source_of(CHAT_TEMPLATE), "bad": source_of(text)}, count=1)
        try:
            with pytest.raises(ArtifactError) as caught:
                await found.ready()
        finally:
            found.close()
        assert "a.jinja" in caught.value.what and why in caught.value.why and caught.value.hint

    asyncio.run(main())


def test_a_dead_process_is_replaced_and_its_job_done() -> None:
    async def main() -> None:
        async with cells() as found:
            await found.render(job("good"))
            victims = found.pids
            for pid in victims[:1]:
                os.kill(pid, signal.SIGKILL)
            for _ in range(4):
                assert await found.render(job("good"))
            async with asyncio.timeout(30):
                while len(found.pids) < 2 or victims[0] in found.pids:
                    await found.render(job("good"))
                    await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_grammar_is_tried_before_a_replica_sees_it() -> None:
    async def main() -> None:
        async with cells() as found:
            for kind, text in (("regex", "[a-z]+"), ("json_schema", '{"type":"object"}'), ("choice", '["a"]'), ("json", "")):
                await found.check(GuideSpec(kind=kind, text=text), "guide")  # type: ignore[arg-type]
            for kind, text in (("regex", "("), ("json_schema", '{"type":"king"}'), ("grammar", "start: missing")):
                with pytest.raises(Rejected) as caught:
                    await found.check(GuideSpec(kind=kind, text=text), "guide")  # type: ignore[arg-type]
                assert caught.value.code == "invalid_schema" and caught.value.why

    asyncio.run(main())


def test_a_bomb_at_the_door_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP: the bomb is a 400 after the bound, good requests and probes are answered meanwhile, a bad grammar reaches no replica."""
    monkeypatch.setattr(sandbox_pool, "PATIENCE_S", 300.0)  # its CPU seconds may take long on a busy host
    with ServedDoor(tmp_path, texts=tiny_texts(tmp_path, TEMPLATES["loop"])) as door, ThreadPoolExecutor(1) as pool:

        def ask(content: str, **fields: object) -> httpx.Response:
            body = {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}
            return httpx.post(f"{door.url}/v1/chat/completions", json=body, trust_env=False, timeout=300)

        assert ask("hi").status_code == 200
        bomb = pool.submit(ask, "bomb")
        while not bomb.done():
            assert door.http.get("/health").status_code == 200
            assert ask("hi").status_code == 200
        refused = bomb.result()
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"
        assert "longer than 2 s" in refused.json()["error"]["message"]
        asked = len(door.dispatcher.asks)
        for fields in ({"guided_regex": "("}, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "king"}}}}):
            answer = ask("hi", **fields)
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_schema", answer.text
        assert len(door.dispatcher.asks) == asked
        pids = door.texts.sandbox.pids
        assert len(pids) >= 1
    assert not any(psutil.pid_exists(pid) for pid in pids)
