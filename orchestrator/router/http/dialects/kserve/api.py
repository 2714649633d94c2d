"""The API of Triton's clients: the KServe v2 protocol over HTTP, and Triton's ``generate`` and ``generate_stream``.

Owns these paths and the wording of their answers. :mod:`orchestrator.router.http.dialects.kserve.tensors` turns a request into the body of
a completion, which is then checked, prepared and streamed like every other. Tensors hold text and numbers, as JSON; there are no binary
tensors.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from orchestrator.router.frontend import schema
from orchestrator.router.frontend.detokenizer import TextSink
from orchestrator.router.frontend.schema import CompletionBody
from orchestrator.router.frontend.text_models import TextModel
from orchestrator.router.http import event_stream
from orchestrator.router.http.dialect import HttpFrontend
from orchestrator.router.http.dialects.kserve import tensors
from orchestrator.router.http.dialects.kserve.tensors import TensorRequest
from orchestrator.router.http.event_stream import EventStream, encode, event
from orchestrator.router.http.in_flight import InFlightRequest
from orchestrator.router.http.response import GenerateResponse, json_response
from workers import __version__
from workers.protocol.errors import Cancelled, NotFound, Rejected, TriremeError, Unavailable, printable
from workers.protocol.messages import UNLIMITED, FinishReason, Logprobs, Usage

#: A served model has one version.
VERSION = "1"
_MODEL = "/v2/models/{name:path}"
#: Stands for the logprob minus infinity, which JSON lacks.
_LOWEST_LOGPROB = -9999.0
#: How an answer is sent: one JSON body of tensors or of text, an event for each piece, or one event.
Form = Literal["infer", "generate", "events", "event"]


class KServeDialect:
    """A :class:`~orchestrator.router.http.dialect.Dialect`. Its methods are the endpoints."""

    prefix: ClassVar[str] = "/v2"

    def __init__(self, frontend: HttpFrontend) -> None:
        self._frontend = frontend

    def routes(self) -> list[Route]:
        """The longest paths first, because the name of a model may contain slashes."""
        found = [
            Route(self.prefix, self.server, methods=["GET"]),
            Route("/v2/health/live", self.live, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
        ]
        for model in (_MODEL + "/versions/{version}", _MODEL):
            found += [
                Route(model + "/infer", self.infer, methods=["POST"]),
                Route(model + "/generate", self.generate, methods=["POST"]),
                Route(model + "/generate_stream", self.generate_stream, methods=["POST"]),
                Route(model + "/ready", self.model_ready, methods=["GET"]),
                Route(model + "/config", self.config, methods=["GET"]),
                Route(model, self.metadata, methods=["GET"]),
            ]
        return found

    def error_body(self, error: TriremeError) -> dict[str, Any]:
        return _error_body(error)

    async def server(self, http: Request) -> Response:
        return json_response(
            http, {"name": "trireme", "version": __version__, "extensions": ["generate", "model_configuration", "parameters"]}
        )

    async def live(self, http: Request) -> Response:
        return json_response(http, {"live": True})

    async def ready(self, http: Request) -> Response:
        if not self._frontend.dispatcher.ready():
            raise Unavailable("not every model has a ready replica", retry_after=1.0)
        return json_response(http, {"ready": True})

    async def model_ready(self, http: Request) -> Response:
        status = self._frontend.dispatcher.model(self._resolve(http).name)
        if status is None or not status.ready:
            raise Unavailable("no replica of the model is ready", retry_after=1.0)
        return json_response(http, {"name": http.path_params["name"], "ready": True})

    async def metadata(self, http: Request) -> Response:
        self._resolve(http)
        inputs = [
            {"name": name, "datatype": one.shown_type(), "shape": [-1, -1 if one.many else 1]} for name, one in tensors.INPUTS.items()
        ]
        outputs = [{"name": name, "datatype": datatype, "shape": [-1, *dims]} for name, (datatype, dims) in tensors.OUTPUTS.items()]
        found = {"name": http.path_params["name"], "versions": [VERSION], "platform": "trireme", "inputs": inputs, "outputs": outputs}
        return json_response(http, found)

    async def config(self, http: Request) -> Response:
        self._resolve(http)
        inputs = [
            {"name": name, "data_type": _config_type(one.shown_type()), "dims": [-1 if one.many else 1], "optional": name != "text_input"}
            for name, one in tensors.INPUTS.items()
        ]
        outputs = [{"name": name, "data_type": _config_type(datatype), "dims": dims} for name, (datatype, dims) in tensors.OUTPUTS.items()]
        return json_response(
            http,
            {
                "name": http.path_params["name"],
                "platform": "",
                "backend": "trireme",
                "version_policy": {"latest": {"num_versions": 1}},
                "max_batch_size": schema.MAX_PROMPTS,
                "input": inputs,
                "output": outputs,
                "model_transaction_policy": {"decoupled": False},
            },
        )

    async def infer(self, http: Request) -> ASGIApp:
        asked = tensors.read_infer(*await self._read(http))
        if asked.stream:
            schema.refuse("stream", "infer answers once; generate_stream streams")
        return await self._answer(http, asked, "infer")

    async def generate(self, http: Request) -> ASGIApp:
        asked = tensors.read_generate(*await self._read(http))
        if asked.stream:
            schema.refuse("stream", "generate answers once; generate_stream streams")
        return await self._answer(http, asked, "generate")

    async def generate_stream(self, http: Request) -> ASGIApp:
        asked = tensors.read_generate(*await self._read(http))
        return await self._answer(http, asked, "event" if asked.stream is False else "events")

    async def _read(self, http: Request) -> tuple[dict[str, Any], str, Callable[[list[str]], None]]:
        """(the body, the name of the model, the function that takes the names of unknown fields)."""
        _check_version(http)
        body = await self._frontend.read_bytes(http, any_type=True)
        if "inference-header-content-length" in http.headers:
            raise Rejected("binary tensors are not taken", "", "send their data as JSON (binary_data=False)")
        return await self._frontend.preprocessor.decode(body), http.path_params["name"], partial(self._frontend.ignored, http)

    async def _answer(self, http: Request, asked: TensorRequest, form: Form) -> GenerateResponse:
        try:
            body = schema.check(asked.fields, CompletionBody)
            credit = event_stream.window(body) if form == "events" else UNLIMITED
            return await self._frontend.generate(http, f"infer-{uuid.uuid4().hex}", body, KServeResponse(asked, body, form), credit=credit)
        except Rejected as error:
            raise asked.respell(error) from None

    def _resolve(self, http: Request) -> TextModel:
        _check_version(http)
        return self._frontend.resolve(http, http.path_params["name"])


class _KServeChoice:
    """The answer to one prompt: what is not sent yet, and the sum of all its logprobs so far."""

    def __init__(self, echo: str) -> None:
        self._texts = [echo]
        self._logprobs: list[float] = []
        self.total = 0.0

    def add(self, text: str, logprobs: list[Logprobs] | None = None) -> None:
        self._texts.append(text)
        values = [max(entry.logprob or 0.0, _LOWEST_LOGPROB) for entry in logprobs or ()]
        self._logprobs += values
        self.total += sum(values)

    def take(self) -> tuple[str, list[float]]:
        """(text, logprobs) since the last call."""
        taken = "".join(self._texts), self._logprobs
        self._texts, self._logprobs = [], []
        return taken


class _KServeSink:
    """The sink of one prompt. It calls ``on_change(output tokens so far, whether this was the end)`` after it has filled ``answer``."""

    def __init__(self, request: InFlightRequest, index: int, answer: _KServeChoice, on_change: Callable[[int, bool], None]) -> None:
        self._request, self._index, self._answer, self._on_change = request, index, answer, on_change

    def on_text(self, choice: int, first: int, tokens: list[int], text: str, logprobs: list[Logprobs] | None) -> None:
        self._answer.add(text, logprobs)
        self._on_change(first + len(tokens), False)

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None: ...

    def on_end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None:
        if reason == "cancelled":
            self.on_failed(choice, Cancelled("the request was cancelled"))
            return
        self._answer.add(tail)
        self._on_change(usage.output_tokens, True)
        self._request.ended(self._index, usage)

    def on_failed(self, choice: int, error: TriremeError) -> None:
        self._request.fail(error)


class KServeResponse:
    """A :class:`~orchestrator.router.http.response.ResponseBuilder`."""

    def __init__(self, asked: TensorRequest, body: CompletionBody, form: Form) -> None:
        self.streamed = form in ("events", "event")
        self._asked, self._body, self._form = asked, body, form
        self._head = {"model_name": body.model, "model_version": VERSION, **({"id": asked.id} if asked.id else {})}

    def stream_sinks(self, request: InFlightRequest, stream: EventStream) -> Sequence[TextSink]:
        answer = self._answers()[0]
        begun = False

        def on_change(count: int, ended: bool) -> None:
            nonlocal begun
            if self._form == "events":
                stream.received(0, count)
            elif not ended:
                return
            text, logprobs = answer.take()
            if text or logprobs or (ended and not begun):
                begun = True
                stream.push(event(self._generated(text, logprobs, answer.total)))

        return [_KServeSink(request, 0, answer, on_change)]

    def whole_sinks(self, request: InFlightRequest) -> tuple[Sequence[TextSink], Callable[[], bytes]]:
        answers = self._answers()

        def body() -> bytes:
            if self._form == "infer":
                return encode(self._inferred(answers))
            return encode(self._generated(*answers[0].take(), answers[0].total))

        return [_KServeSink(request, index, answer, _ignore) for index, answer in enumerate(answers)], body

    def last(self, usages: Sequence[Sequence[Usage]]) -> bytes:
        """Nothing marks the end of a complete stream."""
        return b""

    def broken(self, error: TriremeError) -> bytes:
        return event(_error_body(error))

    def _answers(self) -> list[_KServeChoice]:
        return [_KServeChoice(prompt if self._asked.echo and isinstance(prompt, str) else "") for prompt in self._body.prompts]

    def _generated(self, text: str, logprobs: list[float], total: float) -> dict[str, Any]:
        """The JSON object of ``generate``, and of each event of a stream."""
        values: dict[str, Any] = {"text_output": text, "cum_log_probs": total, "output_log_probs": logprobs}
        return self._head | {name: values[name] for name in self._asked.outputs}

    def _inferred(self, answers: list[_KServeChoice]) -> dict[str, Any]:
        taken = [answer.take() for answer in answers]
        longest = max(len(logprobs) for _, logprobs in taken)
        # All rows of a tensor have one length: shorter rows are filled with zeros, as in TensorRT-LLM's answers.
        padded = [value for _, logprobs in taken for value in (*logprobs, *[0.0] * (longest - len(logprobs)))]
        values: dict[str, tuple[list[int], list[Any]]] = {
            "text_output": ([len(answers), 1], [text for text, _ in taken]),
            "cum_log_probs": ([len(answers), 1], [answer.total for answer in answers]),
            "output_log_probs": ([len(answers), 1, longest], padded),
        }
        outputs = [
            {"name": name, "datatype": tensors.OUTPUTS[name][0], "shape": values[name][0], "data": values[name][1]}
            for name in self._asked.outputs
        ]
        return self._head | {"outputs": outputs}


def _ignore(count: int, ended: bool) -> None:
    """An answer that is sent whole needs no notice of its parts."""


def _error_body(error: TriremeError) -> dict[str, Any]:
    """Triton's form: the text alone."""
    return {"error": printable(str(error))}


def _check_version(http: Request) -> None:
    version = http.path_params.get("version", VERSION)
    if version != VERSION:
        raise NotFound(f"the model has no version {ascii(version[:16])[1:-1]}, only {VERSION}")


def _config_type(datatype: str) -> str:
    """A datatype in the words of a model's configuration."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
