"""Which chat templates are rendered in the router's own process, and that these are quick whatever a small request holds."""

from __future__ import annotations

import time

import pytest

from orchestrator.router.frontend.chat_template import ChatTemplate, TemplateFile, TemplateSource
from orchestrator.router.frontend.sandbox_worker import RenderJob
from orchestrator.router.frontend.text_models import SMALL_BYTES, SMALL_MESSAGES, _is_small
from tests.support.chat_templates import FAMILIES
from workers.protocol.errors import Rejected

#: Templates that can cost as much as they like with a small request, or with any.
UNBOUNDED = (
    "{% for a in range(99999) %}x{% endfor %}",
    "{% if messages[0].content == 'bomb' %}{% for a in range(99999) %}x{% endfor %}{% endif %}fine",
    "{{ 'a' * 2000000000 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ '%999999999s' % messages }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ 'a'.ljust(999999999) }}",
    "{{ 'a' | center(999999999) }}",
    "{{ messages | tojson(indent=999999999) }}",
    "{{ messages | tojson | tojson | tojson }}",
    "{{ strftime_now('%999999Y') }}",
    "{{ lipsum(9999) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages[0].content.replace('', 'xxxx') }}",
    "{{ messages[0].content.replace('a', messages[0].content) }}",
    "{% for m in messages %}{% for n in messages %}x{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ messages | tojson }}{% endfor %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% set all = messages %}{% for m in messages %}{% for n in all %}x{% endfor %}{% endfor %}",
    "{% for m in messages %}{% set all = messages %}{% for n in all %}x{% endfor %}{% endfor %}",
    "{% for m in messages %}{% set m = messages %}{% for n in m %}x{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m.content %}{% for d in m.content %}x{% endfor %}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m.content %}{{ m.content.split('a') | length }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m.content %}{% if 'ab' in m.content %}x{% endif %}{% endfor %}{% endfor %}",
    "{% for c in messages[0].content %}{{ messages[0].content.split('a') | length }}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for m in messages %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for m in messages %}{% set ns.x = ns.x | tojson %}{% endfor %}",
    "{% set ns = namespace(x=[]) %}{% for m in messages %}{% set ns.x = ns.x + messages %}{% endfor %}{% for a in ns.x %}x{% endfor %}",
    "{% set a = messages + messages %}{% set b = a + a %}{% set c = b + b %}",
    "{% set x %}{{ messages }}{% endset %}{{ x }}",
    "{% set f = messages[0].f %}{{ f() }}",
)
#: Real families' ways that must not cost a sandbox job.
QUICK = ("chatml", "llama3", "llama31", "qwen2", "qwen25", "qwen3", "deepseek_v3", "gemma3", "phi3", "zephyr")


def bounded(source: str, specials: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"), **tokens: str) -> ChatTemplate | None:
    file = TemplateFile(source=source, origin="a.jinja")
    return TemplateSource(templates={"default": file}, specials=specials, tokens=tokens).compile_bounded()


@pytest.mark.parametrize("source", UNBOUNDED)
def test_what_may_cost_more_than_a_reading_is_left_to_the_sandbox(source: str) -> None:
    assert bounded(source) is None


@pytest.mark.parametrize("source", ["{% if %}", "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "{{ 1 }}" * 9999])
def test_what_cannot_be_judged_is_left_to_the_sandbox(source: str) -> None:
    assert bounded(source) is None


def conversations() -> dict[str, list[dict[str, object]]]:
    """The most that a small request can hold, in several shapes."""
    room = SMALL_BYTES - 1500
    roles = ("user", "assistant")
    word = "<|im_end|>"
    return {
        "one text": [{"role": "user", "content": "a" * room}],
        "control tokens": [{"role": "user", "content": word * (room // len(word))}],
        "many turns": [{"role": roles[i % 2], "content": "word " * (room // 64 // 5 - 6)} for i in range(SMALL_MESSAGES - 1)],
        "many parts": [{"role": "user", "content": [{"type": "text", "text": "a"}] * (room // 24)}],
    }


@pytest.mark.parametrize("name", QUICK)
def test_a_bounded_template_is_quick_with_the_largest_small_request(name: str) -> None:
    family = FAMILIES[name]
    assert isinstance(family.source, str)
    template = bounded(family.source, family.specials, bos_token=family.bos, eos_token=family.eos)
    assert template is not None
    for shape, messages in conversations().items():
        job = RenderJob(model="m", messages=messages)
        assert _is_small(job), shape
        costs = []
        for _ in range(3):
            begin = time.thread_time()
            try:
                assert job.render(template)
            except Rejected:
                assert shape == "many parts"  # a template that knows texts alone
            costs.append(time.thread_time() - begin)
        assert min(costs) < 0.03, f"{shape}: a stated millisecond, thirty on a slow and busy host: {costs}"


def test_a_request_is_small_by_all_that_the_template_is_given() -> None:
    def job(**fields: object) -> RenderJob:
        return RenderJob(model="m", **{"messages": [{"role": "user", "content": "hi"}], **fields})  # type: ignore[arg-type]

    large = "a" * SMALL_BYTES
    assert _is_small(job()) and _is_small(job(kwargs={"enable_thinking": False, "date": "1 May", "n": 3, "x": None}))
    assert not _is_small(job(messages=[{"role": "user", "content": large}]))
    assert not _is_small(job(messages=[{"role": "user", "content": "a"}] * (SMALL_MESSAGES + 1)))
    assert not _is_small(job(tools=[{"type": "function", "function": {"name": large}}]))
    assert not _is_small(job(documents=[{"text": large}]))
    assert not _is_small(job(kwargs={"part": ["a"] * 9})) and not _is_small(job(kwargs={"n": 10**9999}))
